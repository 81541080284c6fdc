"""`muonlm data`: turn text into token shards, and look at them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from muonlm.cli.parser import add_config
from muonlm.config.errors import UserError


def add(commands: Any) -> None:
    """Register the command and its subcommands."""
    parser = commands.add_parser("data", help="prepare, describe or verify a data set", description=__doc__)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    prepare = actions.add_parser(
        "prepare",
        keys_of="data",
        help="text to token shards; repeating it goes on where it stopped",
        description=(
            "Train or load a tokenizer, tokenize text, write shards with checksums. Without CONFIG, everything is\n"
            "given as KEY=VALUE: muonlm data prepare source.kind=text source.files='[\"*.txt\"]' output=data/mine"
        ),
    )
    add_config(prepare, "data", optional=True)
    prepare.set_defaults(run=_prepare)
    describe = actions.add_parser("describe", help="what a prepared data set holds")
    describe.add_argument("path", metavar="PATH", help="directory of a prepared data set")
    describe.set_defaults(run=_describe)
    verify = actions.add_parser("verify", help="check every shard of a prepared data set against its checksum")
    verify.add_argument("path", metavar="PATH", help="directory of a prepared data set")
    verify.set_defaults(run=_verify)


def _prepare(args: argparse.Namespace) -> int:
    from muonlm.config.data import PrepareConfig
    from muonlm.config.load import dump_toml, load_prepare, parse_overrides, validate

    if args.config and "=" in args.config:
        args.overrides, args.config = [args.config, *args.overrides], None
    if args.config:
        config = load_prepare(args.config, args.overrides)
    else:
        config = validate(PrepareConfig, parse_overrides(PrepareConfig, args.overrides), "data prepare")
    if args.dry_run:
        print(dump_toml(config), end="")
        return 0
    from muonlm.data.prepare import prepare

    prepare(config)
    return _show(config.output)


def _describe(args: argparse.Namespace) -> int:
    return _show(args.path)


def _show(path: str) -> int:
    from rich.console import Console
    from rich.table import Table

    from muonlm.data.dataset import describe

    about = describe(path)
    table = Table("", title=f"vocabulary of {about['vocab_size']:,}", title_justify="left")
    for split in about["splits"]:
        table.add_column(split, justify="right")
    for name in ("tokens", "documents", "text_bytes", "bytes_per_token", "shards", "file_bytes"):
        counts = (split[name] for split in about["splits"].values())
        table.add_row(name.replace("_", " "), *(f"{n:.3f}" if isinstance(n, float) else f"{n:,}" for n in counts))
    console = Console()
    console.print(about["path"], markup=False, highlight=False)
    console.print(table)
    source = ", ".join(f"{key} {value}" for key, value in about["source"].items())
    console.print(f"source: {source}\ntokenizer: {about['tokenizer_fingerprint']}", markup=False, highlight=False)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from muonlm.data.dataset import verify

    if not Path(args.path).is_dir():
        raise UserError(f"{args.path}: no such directory")
    checked = verify(args.path)
    print(f"{args.path}: {checked['shards']} shards, {checked['file_bytes']:,} bytes, all as they were written")
    return 0
