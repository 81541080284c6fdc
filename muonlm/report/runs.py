"""Reading run directories for a report: settings, status, metric records, and curves made from them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from muonlm.compare.analysis import eval_curve
from muonlm.track.metrics import read_metrics


@dataclass(frozen=True)
class Run:
    """What a run directory holds; empty tables for files that are missing."""

    path: Path
    config: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def train(self) -> list[dict[str, Any]]:
        """Training records."""
        return [r for r in self.records if r["kind"] == "train"]

    @property
    def evals(self) -> list[tuple[float, float, float]]:
        """(tokens, seconds, loss) of the evaluations along the run, all on the same sequences."""
        points = eval_curve(self.records)
        times = {r["tokens"]: r["time_s"] for r in self.records if r["kind"] == "eval"}
        return [(tokens, times[tokens], loss) for tokens, loss in sorted(points.items())]

    def typical(self, key: str) -> float | None:
        """Median of a value over the training records; None where it was not recorded."""
        values = [r[key] for r in self.train if r.get(key) is not None]
        return median(values) if values else None


def read_run(path: Path) -> Run:
    """Read what there is; a run under way or stopped early has less."""
    config = tomllib.loads(path.joinpath("config.toml").read_text()) if (path / "config.toml").exists() else {}
    return Run(path, config, read_json(path / "status.json"), read_json(path / "environment.json"), read_metrics(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file does not exist or is half written."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


Points = Sequence[tuple[float, float]]


def mean_curve(curves: Sequence[Points]) -> list[tuple[float, float]]:
    """Mean of x and of y over curves, point by point, as far as the shortest goes."""
    return [(fmean(x for x, _ in points), fmean(y for _, y in points)) for points in zip(*curves)]
