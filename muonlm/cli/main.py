"""`muonlm COMMAND`: the parser, and what errors and interrupts mean for the exit code.

Exit codes: 0 done, or stopped on request in a way that goes on later; 1 a fault of the program, with its traceback;
2 something in the input is wrong, with a message; 130 interrupted; 141 whoever read the output has gone before its end
(but never for a training run, which goes on).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import muonlm
from muonlm.cli import bench, compare, data, doctor, export, plan, report, study, submit, train
from muonlm.cli.parser import Parser, forget_stdout, take_overrides
from muonlm.config.errors import UserError


def build_parser() -> Parser:
    """The parser of all commands. Imports no schema: the keys of a config are looked up when help asks for them."""
    parser = Parser(
        prog="muonlm",
        description="Distributed LLM pretraining with Muon, measured against AdamW.",
        epilog="Start with `muonlm train smoke`. `muonlm COMMAND --help` has every option of a command.",
    )
    parser.add_argument("--version", action="version", version=f"muonlm {muonlm.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (train, plan, submit, data, compare, report, study, export, bench, doctor):
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    take_overrides(parser, args, rest)
    try:
        code = int(args.run(args))
        if sys.stdout is not None:  # closed before the start
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        forget_stdout()
        return 141
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # rich makes that of it
            return 141
        raise
    except UserError as error:
        sys.stderr.write(_error_text(args.command, str(error)))
        return _failed(2)
    except KeyboardInterrupt:
        print(f"\nmuonlm {args.command}: interrupted; repeat the same command to go on", file=sys.stderr)
        return 130
    except Exception:
        if _is_rank():
            traceback.print_exc()
            _failed(1)
        raise


def _is_rank() -> bool:
    """Whether torchrun waits for this process and others to end."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _failed(code: int) -> int:
    """The exit code; as a rank of torchrun end at once, while the error still holds what it came through.

    Freeing that can deadlock after another rank was lost: DistributedDataParallel joins gloo's threads without giving
    up the interpreter's lock, and a thread of gloo that frees a tensor waits for this lock. All files are closed here.
    """
    if _is_rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _error_text(command: str, message: str) -> str:
    """The message as it is on rank 0; in one line on the others, which mostly find the same mistake, but not always.

    With its line break in one text, so that ranks that write at the same time do not mix.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return f"muonlm {command}: error\n{message}\n"
    return f"muonlm {command}: error on rank {rank}: {' '.join(message.split())}\n"
