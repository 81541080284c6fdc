"""Spectra of a comparison's largest final runs, measured once and kept in `spectra.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonlm.report.runs import read_json

if TYPE_CHECKING:
    from muonlm.report.comparison import Runs


def spectra_of(comparison: Mapping[str, Any], runs: Runs, directory: Path) -> dict[str, Any] | None:
    """The result of the spectra study on every arm and seed, each run with its `arm`; None without all checkpoints."""
    arms = {str(run.path.relative_to(directory)): arm for arm, seeds in runs.items() for run in seeds.values()}
    if comparison["state"] != "finished" or not all(runs.values()):
        return None
    cache = directory / "spectra.json"
    kept = read_json(cache)
    if {entry["run_dir"] for entry in kept.get("runs", [])} == set(arms):
        return kept
    if not all(any((directory / path / "checkpoints").glob("step_*/complete.json")) for path in arms):
        return None
    from muonlm.study import spectra

    result = spectra.run([directory / path for path in arms])
    for entry in result["runs"]:
        entry["run_dir"] = str(Path(entry["run_dir"]).relative_to(directory))
        entry["arm"] = arms[entry["run_dir"]]
    cache.write_text(json.dumps(result, indent=1))
    return result
