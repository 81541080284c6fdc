"""`muonlm study`: small measurements on finished runs, each with a verdict on a claim about Muon."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the command and its subcommands."""
    parser = commands.add_parser("study", help="measure finished runs, with a verdict on a claim", description=__doc__)
    actions = parser.add_subparsers(dest="action", metavar="STUDY", required=True)
    spectra = actions.add_parser(
        "spectra",
        help="effective rank of the hidden matrices, Muon against AdamW",
        description="Singular values of the hidden matrices in the last checkpoint of each run.",
    )
    spectra.add_argument("runs", metavar="RUN", nargs="+", help="run directory")
    spectra.add_argument("--out", metavar="FILE", help="also write the result as JSON")
    spectra.set_defaults(run=_spectra)


def _spectra(args: argparse.Namespace) -> int:
    from rich.console import Console

    from muonlm.study import spectra

    result = spectra.run(args.runs)
    console = Console()
    console.print(spectra.table(result))
    console.print(result["verdict"]["text"], highlight=False, markup=False)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(args.out)
    return 0
