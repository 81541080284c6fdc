"""What the commands share: a parser whose help ends with the keys of a config, and arguments of the form key=value."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn

WIDTH = 100


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=WIDTH, max_help_position=28)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that appends all keys of the config kind `keys_of` to its help."""

    def __init__(self, *args: Any, keys_of: str | None = None, **options: Any) -> None:
        # Abbreviations would make every new option a change of what old commands mean.
        super().__init__(*args, **{"formatter_class": _formatter, "allow_abbrev": False, **options})
        self.keys_of = keys_of

    def format_help(self) -> str:
        """Usage and options, then the keys."""
        text = super().format_help()
        if self.keys_of is None:
            return text
        from muonlm.config.help import reference
        from muonlm.config.load import KINDS

        return (
            f"{text}\nKeys of a {self.keys_of} config with default and type, in the file or as KEY=VALUE "
            f"(docs/config.md):\n\n{reference(KINDS[self.keys_of])}"
        )


def add_config(parser: argparse.ArgumentParser, kind: str, *, optional: bool = False, dry_run: bool = True) -> None:
    """The arguments CONFIG, KEY=VALUE ... and --dry-run."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?" if optional else None,
        help=f"{kind} config: path of a TOML file, or a name in configs/{kind}/",
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="set a key: a TOML value, a bare word as text, nothing after = to unset it",
    )
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print the whole config as TOML and stop")


def take_overrides(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Give arguments left over by the parser to the command: KEY=VALUE after an option, or all for `bench`.

    argparse ends the list of KEY=VALUE at the first option. Raises SystemExit(2) for what remains.
    """
    if getattr(args, "passes_rest", False):
        args.rest = rest
        return
    wrong = [text for text in rest if text.startswith("-") or not hasattr(args, "overrides")]
    if wrong:
        _refuse(parser, args, wrong)
    elif rest:
        args.overrides = [*args.overrides, *rest]


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, wrong: list[str]) -> NoReturn:
    hint = "; keys of the config are given without dashes, as in loop.steps=100" if hasattr(args, "overrides") else ""
    parser.error(f"{args.command} does not know {' '.join(wrong)}{hint} (see muonlm {args.command} --help)")


def forget_stdout() -> None:
    """After whoever read standard output has gone: write the rest to nowhere, so that leaving does not fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
