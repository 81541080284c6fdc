"""From finished trials to the `ratios` of compare.json: end losses by budget, evaluation curves, seconds per token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from muonlm.compare.ratio import paired_ratio, summarise
from muonlm.track.metrics import read_metrics

Entry = Mapping[str, Any]


def final_trials(comparison: Entry, arm: str) -> list[Entry]:
    """The final runs of an arm, by budget and seed."""
    finals = [t for t in comparison["trials"] if t["arm"] == arm and t["phase"] == "final"]
    return sorted(finals, key=lambda t: (t["budget_tokens"], t["seed"]))


def end_losses(comparison: Entry, arm: str) -> dict[int, dict[float, float]]:
    """seed -> {tokens: end loss} of the final runs of an arm; infinity where a run failed."""
    curves: dict[int, dict[float, float]] = {}
    for trial in final_trials(comparison, arm):
        loss = trial["final_loss"]
        tokens = trial["tokens"] or trial["budget_tokens"]
        curves.setdefault(trial["seed"], {})[tokens] = float("inf") if loss is None else loss
    return curves


def eval_curve(records: Iterable[Entry]) -> dict[float, float]:
    """{tokens: loss} of the evaluations along a run, all on the same sequences.

    The evaluation at the end may be on more sequences than those on the way; it is then no point of this curve.
    """
    evals = [r for r in records if r["kind"] == "eval" and r["tokens"] > 0]
    return {r["tokens"]: r["loss"] for r in evals if r["eval_tokens"] == evals[0]["eval_tokens"]}


def seconds_per_token(records: Iterable[Entry]) -> float | None:
    """Training seconds per token of a run, evaluation and saving excluded; None without a measurement."""
    last: Entry = next(iter([r for r in records if r["kind"] in ("train", "eval")][::-1]), {})
    return last["time_s"] / last["tokens"] if last.get("tokens") else None


def ratios_of(comparison: Entry, directory: Path) -> list[dict[str, Any]]:
    """All ratios of a finished comparison: for each arm but the reference, by budget and in-run."""
    reference = comparison["reference"]
    ratios = []
    for arm in (a["name"] for a in comparison["arms"] if a["name"] != reference):
        ref_ends, arm_ends = end_losses(comparison, reference), end_losses(comparison, arm)
        ref_runs = _largest_runs(comparison, reference, directory)
        arm_runs = _largest_runs(comparison, arm, directory)
        seeds = sorted(ref_ends.keys() & arm_ends.keys())
        factors = []
        for seed in seeds:
            slow, fast = seconds_per_token(ref_runs[seed]), seconds_per_token(arm_runs[seed])
            factors.append(slow / fast if slow and fast else None)
        by_budget = [paired_ratio(ref_ends[seed], arm_ends[seed], seed) for seed in seeds]
        in_run = [paired_ratio(eval_curve(ref_runs[seed]), eval_curve(arm_runs[seed]), seed) for seed in seeds]
        ratios += [summarise(arm, "budget", by_budget, factors), summarise(arm, "in_run", in_run, factors)]
    return ratios


def _largest_runs(comparison: Entry, arm: str, directory: Path) -> dict[int, list[dict[str, Any]]]:
    """seed -> metric records of the run with the arm's largest budget."""
    return {t["seed"]: list(read_metrics(directory / t["run_dir"])) for t in final_trials(comparison, arm)}
