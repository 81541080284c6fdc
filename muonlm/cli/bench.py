"""`muonlm bench`: speed against plain PyTorch and against peers, measured in the same run."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Register the command and its subcommands, which parse their own options."""
    parser = commands.add_parser("bench", help="measure speed against plain PyTorch and peers", description=__doc__)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", add_help=False, help="training steps; --help lists its options")
    train.set_defaults(run=_train, passes_rest=True)
    moe = actions.add_parser("moe", add_help=False, help="a layer of experts; --help lists its options")
    moe.set_defaults(run=_moe, passes_rest=True)
    optimizer = actions.add_parser(
        "optimizer", add_help=False, help="optimizer steps on several ranks; --help lists its options"
    )
    optimizer.set_defaults(run=_optimizer, passes_rest=True)
    deepspeed = actions.add_parser(
        "deepspeed", add_help=False, help="Muon under DeepSpeed beside DeepSpeed's own; --help lists its options"
    )
    deepspeed.set_defaults(run=_deepspeed, passes_rest=True)
    coordinates = actions.add_parser(
        "coordinates", add_help=False, help="whether updates depend on the width; --help lists its options"
    )
    coordinates.set_defaults(run=_coordinates, passes_rest=True)
    newton_schulz = actions.add_parser(
        "newton-schulz", add_help=False, help="orthogonalization and its kernels; --help lists its commands"
    )
    newton_schulz.set_defaults(run=_newton_schulz, passes_rest=True)


def _train(args: argparse.Namespace) -> int:
    from muonlm.bench.train import main

    return int(main(args.rest) or 0)


def _moe(args: argparse.Namespace) -> int:
    from muonlm.bench.moe import main

    return int(main(args.rest) or 0)


def _optimizer(args: argparse.Namespace) -> int:
    from muonlm.bench.optimizer import main

    return int(main(args.rest) or 0)


def _deepspeed(args: argparse.Namespace) -> int:
    from muonlm.bench.deepspeed import main

    return int(main(args.rest) or 0)


def _coordinates(args: argparse.Namespace) -> int:
    from muonlm.bench.coordinates import main

    return int(main(args.rest) or 0)


def _newton_schulz(args: argparse.Namespace) -> int:
    from muonlm_kernels.bench.__main__ import main

    return int(main(args.rest, prog="muonlm bench newton-schulz") or 0)
