#!/usr/bin/env bash
# Build the image without a Docker engine, and without a registry: a base from Debian's packages (debootstrap), the
# Dockerfile by buildah, and then the checks that an image must pass. Needs root, buildah and debootstrap
# (apt-get install --no-install-recommends buildah debootstrap), 6 GB of disk, and a few minutes.
#
#   bash docker/build-local.sh [RESULT.json]
#
# IMAGE_DIR=DIR      keep base, layers and image there, and reuse them next time (default: a temporary folder)
# SUITE=bookworm     release of Debian to make the base of;  MIRROR=URL  archive to take it from
# BASE_IMAGE=NAME    build on this image instead, which is in IMAGE_DIR or can be pulled
# EXTRAS=a,b         extras of muonlm in the image (default: none)
# PYTHON=python3     interpreter whose pip is asked which index, folder of wheels and certificate it uses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() { sed -n '/^# Build/,/^# PYTHON/s/^# \{0,1\}//p' docker/build-local.sh; } # the comment above
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  -*) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
esac
[[ $# -le 1 ]] || { echo "one RESULT.json at most, not: $*" >&2; exit 2; }
python=${PYTHON:-python3}
image=localhost/muonlm:local

for program in buildah "$python"; do
  command -v "$program" >/dev/null || { echo "no $program here (apt-get install buildah)" >&2; exit 3; }
done
[[ $EUID -eq 0 ]] || { echo "debootstrap and the chroot of the build need root" >&2; exit 3; }

if [[ -n ${IMAGE_DIR:-} ]]; then
  mkdir -p "$IMAGE_DIR" && work=$(realpath "$IMAGE_DIR")
else
  work=$(mktemp -d)
fi

export BUILDAH_ISOLATION=chroot TMPDIR=$work/tmp REGISTRY_AUTH_FILE=$work/auth.json
mkdir -p "$TMPDIR"
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$work/policy.json"
[[ -f $work/auth.json ]] || echo '{}' >"$work/auth.json"
# overlay is faster and shares layers; it cannot be where the folder itself lies on an overlay, as in most containers.
buildah() { command buildah --storage-driver "$driver" --root "$work/$driver" --runroot "$work/run" "$@"; }
clean() {
  buildah rm --all >/dev/null 2>&1 || true
  rm -rf "${work:?}/tmp" "$work/rootfs"
  [[ -n ${IMAGE_DIR:-} ]] || rm -rf "$work"
}
trap clean EXIT
driver=overlay
buildah info >/dev/null 2>&1 || driver=vfs

if [[ -z ${BASE_IMAGE:-} ]]; then
  BASE_IMAGE=localhost/base:${SUITE:-bookworm}
  if ! buildah inspect --type image "$BASE_IMAGE" >/dev/null 2>&1; then
    command -v debootstrap >/dev/null || { echo "no debootstrap here (apt-get install debootstrap)" >&2; exit 3; }
    echo "making $BASE_IMAGE"
    rm -rf "$work/rootfs"
    debootstrap --variant=minbase --include=ca-certificates "${SUITE:-bookworm}" "$work/rootfs" ${MIRROR:+"$MIRROR"} \
      >"$work/debootstrap.log" 2>&1 || { tail -n 5 "$work/debootstrap.log" >&2; exit 1; }
    rm -rf "$work"/rootfs/var/cache/apt/archives/*.deb "$work"/rootfs/var/lib/apt/lists/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/rootfs" / >/dev/null
    buildah config --cmd bash "$container"
    buildah commit --quiet --rm --signature-policy "$work/policy.json" "$container" "$BASE_IMAGE" >/dev/null
    rm -rf "$work/rootfs"
  fi
fi

# Layers that stay for the next build cost a copy of the image for each instruction.
layers=$([[ -n ${IMAGE_DIR:-} ]] && echo true || echo false)
mapfile -t pip < <("$python" docker/pip_arguments.py)
seconds=$SECONDS
buildah bud --format docker --layers="$layers" --signature-policy "$work/policy.json" --network host \
  --file docker/Dockerfile --ignorefile docker/Dockerfile.dockerignore "${pip[@]}" \
  --build-arg BASE_IMAGE="$BASE_IMAGE" --build-arg EXTRAS="${EXTRAS:-}" \
  --build-arg VERSION="$("$python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')" \
  --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
  --tag "$image" . >"$work/build.log" 2>&1 || { tail -n 40 "$work/build.log" >&2; exit 1; }
build_s=$((SECONDS - seconds))

# As `docker run`: the image's own entry point, user, environment and working directory.
mapfile -t entrypoint < <(buildah inspect --type image \
  --format '{{range .Docker.Config.Entrypoint}}{{println .}}{{end}}' "$image" | sed '/^$/d')
container=$(buildah from --signature-policy "$work/policy.json" "$image")
run() { buildah run --network host --hostname muonlm "$@" </dev/null; }
logged() { # NAME COMMAND ...: its output goes to NAME.log, and its end to the terminal where it fails
  "${@:2}" >"$work/$1.log" 2>&1 || { echo "$1 failed:" >&2; tail -n 30 "$work/$1.log" >&2; exit 1; }
}
logged train run "$container" -- "${entrypoint[@]}" train smoke loop.device=cpu loop.threads=1 name=local
logged torchrun run "$container" -- "${entrypoint[@]}" torchrun --standalone --nproc-per-node 2 -m muonlm \
  train smoke loop.device=cpu name=two dist.zero=2
# Somebody's own uid, as compose.yaml gives it.
logged uid run --user 4321:4321 "$container" -- "${entrypoint[@]}" train smoke loop.device=cpu loop.threads=1 name=other
run "$container" -- healthcheck.py

# What must not be in the last stage.
# shellcheck disable=SC2016 # expanded inside
logged tools run --user 0 "$container" -- bash -c 'for name in gcc cc g++ c++ clang make cmake git ld nvcc; do
    if command -v $name; then exit 1; fi
  done
  if ls /usr/include/python3*; then exit 1; fi
  if ls -A /var/lib/apt/lists /var/cache/apt | grep -v : | grep .; then exit 1; fi'

# Triton's module must be found without a compiler; an empty library stands in for the driver (triton_driver.py).
triton=null
if command -v gcc >/dev/null && run "$container" -- python -c 'import triton' 2>/dev/null; then
  mkdir -p "$work/stub"
  gcc -shared -x c /dev/null -o "$work/stub/libcuda.so.1" -Wl,-soname,libcuda.so.1
  logged triton run --volume "$work/stub:/stub:ro" "$container" -- python -c '
import ctypes, os, sys
ctypes.CDLL("/stub/libcuda.so.1")
os.environ["TRITON_LIBCUDA_PATH"] = "/stub"
sys.setdlopenflags(os.RTLD_LAZY)
from triton.backends.nvidia.driver import CudaUtils
CudaUtils()'
  triton=true
fi

run "$container" -- python -c '
import json, os, pathlib
runs = {path.parent.name: json.loads(path.read_text())["state"] for path in pathlib.Path("runs").glob("*/status.json")}
owners = sorted({path.stat().st_uid for path in pathlib.Path("runs").iterdir()})
print(json.dumps({"uid": os.getuid(), "runs": runs, "owners": owners}))
' >"$work/inside.json"
buildah images --json "$image" >"$work/images.json"
buildah inspect --type image "$image" >"$work/inspect.json"
"$python" - "$work" "$build_s" "$driver" "$triton" <<'PYTHON' | tee "${1:-/dev/null}"
import json, pathlib, sys
work = pathlib.Path(sys.argv[1])
read = lambda name: json.loads((work / name).read_text())
image, config = read("images.json")[0], read("inspect.json")["Docker"]
settings = config["config"]
print(json.dumps({
    "build_s": int(sys.argv[2]), "storage": sys.argv[3], "size": image["size"], "layers": len(config["rootfs"]["diff_ids"]),
    "user": settings["User"], "entrypoint": settings["Entrypoint"], "healthcheck": settings["Healthcheck"]["Test"],
    "labels": settings["Labels"], "triton_without_compiler": json.loads(sys.argv[4]), **read("inside.json"),
}, indent=1))
PYTHON
