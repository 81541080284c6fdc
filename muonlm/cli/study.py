"""`muonlm study`: small measurements on finished runs, each with a verdict on a claim about Muon."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from muonlm.config.errors import UserError


def add(commands: Any) -> None:
    """Register the command and its subcommands."""
    parser = commands.add_parser("study", help="measure finished runs, with a verdict on a claim", description=__doc__)
    actions = parser.add_subparsers(dest="action", metavar="STUDY", required=True)
    spectra = actions.add_parser(
        "spectra",
        help="effective rank of the hidden matrices, Muon against AdamW",
        description="Singular values of the hidden matrices in the last checkpoint of each run.",
    )
    spectra.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="run directory, or that of a comparison: its finished final runs at the largest budget",
    )
    spectra.add_argument("--out", metavar="FILE", help="also write the result as JSON")
    spectra.set_defaults(run=_spectra)


def runs_in(directory: Path) -> list[Path]:
    """The run itself, or of a comparison the finished final runs at the largest budget that has any."""
    record = directory / "compare.json"
    if not record.is_file():
        return [directory]
    trials = json.loads(record.read_text(encoding="utf-8"))["trials"]
    final = [trial for trial in trials if trial["phase"] == "final" and trial["state"] == "finished"]
    if not final:
        raise UserError(f"{directory}: no final run is finished yet; go on with muonlm compare")
    largest = max(trial["budget_tokens"] for trial in final)
    return [directory / trial["run_dir"] for trial in final if trial["budget_tokens"] == largest]


def _spectra(args: argparse.Namespace) -> int:
    from rich.console import Console

    from muonlm.study import spectra

    result = spectra.run([run for directory in args.runs for run in runs_in(Path(directory))])
    console = Console()
    console.print(spectra.table(result))
    console.print(result["verdict"]["text"], highlight=False, markup=False)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(args.out)
    return 0
