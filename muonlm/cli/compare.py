"""`muonlm compare`: arms x learning rates x budgets x seeds, then the token ratio between them."""

from __future__ import annotations

import argparse
from typing import Any

from muonlm.cli.parser import add_config


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "compare",
        keys_of="compare",
        help="train several optimizers alike and measure the tokens that one saves",
        description=(
            "Tune every arm with the same number of runs, train the best settings at several budgets and\n"
            "seeds, and report the ratio of tokens to equal loss. Runs that finished are not run again."
        ),
    )
    add_config(parser, "compare")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the comparison and write the report; 130 where it was stopped on the way."""
    from muonlm.config.load import dump_toml, load_compare

    config = load_compare(args.config, args.overrides)
    if args.dry_run:
        print(dump_toml(config), end="")
        return 0
    from muonlm.compare.run import compare

    result = compare(config)
    if result["state"] == "interrupted":
        return 130  # `compare` has said how to go on
    from rich.console import Console

    from muonlm.report.build import build_report
    from muonlm.report.summary import summary

    Console().print(summary(result))
    print(f"report: {build_report(config.resolved_output_dir)}")
    return 0
