"""`muonlm report`: one HTML page that opens from disk, for a run or a comparison."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from muonlm.config.errors import UserError


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "report", help="figures and one HTML page from a run or a comparison", description=__doc__
    )
    parser.add_argument("directory", metavar="DIR", help="run directory, or directory of a comparison")
    parser.add_argument("--out", metavar="FILE", help="where to write the page; DIR/report.html by default")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build the page and say where it is."""
    if not Path(args.directory).is_dir():
        raise UserError(f"{args.directory}: no such directory; give the directory of a run or of a comparison")
    from muonlm.report.build import build_report

    page = build_report(args.directory, args.out)
    print(page)
    if args.open:
        import webbrowser

        webbrowser.open(Path(page).resolve().as_uri())
    return 0
