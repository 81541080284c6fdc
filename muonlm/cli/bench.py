"""`muonlm bench`: speed against plain PyTorch, both measured in the same run."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Register the command and its subcommands, which parse their own options."""
    parser = commands.add_parser("bench", help="measure training speed against plain PyTorch", description=__doc__)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", add_help=False, help="training steps; --help lists its options")
    train.set_defaults(run=_train, passes_rest=True)


def _train(args: argparse.Namespace) -> int:
    from muonlm.bench.train import main

    return int(main(args.rest) or 0)
