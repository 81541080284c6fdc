#!/usr/bin/env bash
# What a container runs: `docker run IMAGE train smoke` is `muonlm train smoke`; programs of the list below run as such.
set -euo pipefail

case ${1:-} in
  torchrun)
    shift
    # The ranks of one container meet on its own address, also where its name cannot be resolved.
    if [[ " $* " == *" --standalone "* && " $* " != *" --local-addr"* && " $* " != *" --local_addr"* ]]; then
      set -- --local-addr=127.0.0.1 "$@"
    fi
    exec torchrun "$@"
    ;;
  muonlm | python | python3 | bash | sh | accelerate | deepspeed) exec "$@" ;;
  *) exec muonlm "$@" ;;
esac
