"""Newton-Schulz orthogonalization: speed, errors, and the GPU kernels.

Without a command it compares (`compare`).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

# Module and one line of help of each command. Modules are imported when they are asked for: some need packages that
# others do not, and each may take seconds.
COMMANDS: Final = {
    "compare": ("compare", "time and error beside those of other implementations, in one run (default)"),
    "errors": ("errors", "errors of the coefficient sets on matrices of known spectra"),
    "associative-memory": ("associative_memory", "one step on associations of unequal frequency"),
    "compiled": ("compiled", "registers, memories and instructions of the GPU kernels as compiled; needs no GPU"),
    "gpu": ("gpu_report", "check and tune the kernels on the GPU that is there, and write a report"),
}
_DEFAULT: Final = "compare"


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m muonlm_kernels.bench") -> int:
    """Run the command that `argv` (default: the process's arguments) starts with; returns its exit code."""
    rest = list(sys.argv[1:] if argv is None else argv)
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-h", "--help")):
        rest.insert(0, _DEFAULT)
    command = _parser(prog).parse_args(rest[:1]).command
    module = importlib.import_module(f"muonlm_kernels.bench.{COMMANDS[command][0]}")
    options = argparse.ArgumentParser(
        prog=f"{prog} {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(options)
    args = options.parse_args(rest[1:])
    try:
        code = int(module.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has gone: nothing is left to say, also when Python closes its files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [COMMAND] [OPTIONS]",
        description=__doc__,
        epilog="commands:\n" + "\n".join(f"  {name:<20}{line}" for name, (_, line) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="one of those below; --help lists its options"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
