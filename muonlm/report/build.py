"""`build_report`: the page of a comparison or of a single run."""

from __future__ import annotations

from pathlib import Path

from muonlm.config.errors import UserError
from muonlm.report.comparison import comparison_page
from muonlm.report.page import write
from muonlm.report.runs import read_json, read_run
from muonlm.report.single import run_page


def build_report(directory: str | Path, out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about a comparison or a run, and its figures as PNG; returns the page's path.

    The page is `<directory>/report.html` unless `out` says otherwise; the figures go into `figures/` beside it. Works
    on what there is: a run under way gives a report of what it has done so far. Raises UserError when `directory` is
    neither a comparison nor a run.
    """
    directory = Path(directory)
    if (directory / "compare.json").exists():
        page = comparison_page(read_json(directory / "compare.json"), directory)
    elif (directory / "config.toml").exists() and (directory / "metrics.jsonl").exists():
        page = run_page(read_run(directory))
    else:
        raise UserError(
            f"{directory} is neither a comparison (compare.json) nor a run (config.toml and metrics.jsonl); "
            "give the directory that `muonlm compare` or `muonlm train` has written"
        )
    target = Path(out) if out is not None else directory / "report.html"
    write(page, target, target.parent / "figures")
    return target
