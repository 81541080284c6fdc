"""`muonlm plan`: what a run will need, from its config alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonlm.cli.parser import add_config
from muonlm.config.errors import UserError

if TYPE_CHECKING:
    from muonlm.config.schema import TrainConfig


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "plan",
        keys_of="train",
        help="parameters, memory, FLOPs and communication of a run before it starts",
        description="Parameters, memory, FLOPs and communication of a run, from its config, on any machine.",
    )
    add_config(parser, "train", dry_run=False)
    parser.add_argument("--world-size", type=_positive, default=1, metavar="N", help="number of ranks; 1 by default")
    parser.add_argument("--vocab-size", type=_positive, metavar="N", help="where neither config nor data tell it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the forecast."""
    from muonlm.config.load import load_train

    config = load_train(args.config, args.overrides)
    from muonlm.plan.forecast import forecast, table

    vocab_size = find_vocab_size(config, args.vocab_size)
    print(table(forecast(config, vocab_size=vocab_size, world_size=args.world_size)))
    return 0


def find_vocab_size(config: TrainConfig, given: int | None) -> int:
    """From the option, else the config, else the prepared data, else the data config that would prepare them."""
    if found := given or config.model.vocab_size:
        return found
    from muonlm.data.manifest import MANIFEST_NAME, read_manifest

    if (Path(config.data.path) / MANIFEST_NAME).is_file():
        return read_manifest(Path(config.data.path)).vocab_size
    if config.data.prepare:
        from muonlm.config.load import load_prepare

        tokenizer = load_prepare(config.data.prepare).tokenizer
        if tokenizer.existing is None:
            return tokenizer.vocab_size
    raise UserError(f"the vocabulary is not known before {config.data.path} is prepared; give --vocab-size N")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value
