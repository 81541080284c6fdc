"""The page of a comparison: the verdict first, then what it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muonlm.compare.analysis import end_losses, final_trials
from muonlm.compare.progress import short_seconds, short_tokens
from muonlm.report import comparison_figures
from muonlm.report.page import Cell, Page, Section, Table, Tile, Tone, Verdict, cells
from muonlm.report.runs import Run, read_run
from muonlm.report.settings import arm_differences, environment_table, reproduce_block, toml_block
from muonlm.report.spectra import spectra_of

Runs = Mapping[str, Mapping[int, Run]]
"""arm -> seed -> the final run of the arm's largest budget; the reference comes first."""

_TONES: dict[bool | None, Tone] = {True: "good", False: "bad", None: "open"}


def comparison_page(comparison: Mapping[str, Any], directory: Path) -> Page:
    """The report of a comparison, finished or not."""
    runs = largest_runs(comparison, directory)
    sections = [
        _ratios(comparison, runs),
        comparison_figures.losses(runs),
        comparison_figures.tuning(comparison, _optima(comparison)),
        _cost(runs),
        comparison_figures.norms(runs),
    ]
    if (spectra := spectra_of(comparison, runs, directory)) is not None:
        sections.append(comparison_figures.effective_rank(spectra, list(runs)))
    sections += [Section("Every run", tables=[_trials(comparison)]), _settings(comparison, runs, directory)]
    return Page(
        title=f"Comparison {comparison['name']}",
        verdicts=_verdicts(comparison),
        tiles=_tiles(comparison),
        sections=sections,
        footer=f"Made by muonlm from {directory}. Losses are in nats per token on held-out documents.",
    )


def arm_names(comparison: Mapping[str, Any]) -> list[str]:
    """The reference first, then the others in their order."""
    names = [arm["name"] for arm in comparison["arms"]]
    return sorted(names, key=lambda name: name != comparison["reference"])


def largest_runs(comparison: Mapping[str, Any], directory: Path) -> Runs:
    """The run of each arm's largest budget by seed, as far as there is one on disk."""
    runs: dict[str, dict[int, Run]] = {}
    for name in arm_names(comparison):
        trials = [t for t in final_trials(comparison, name) if t["state"] == "finished"]
        latest = {t["seed"]: directory / t["run_dir"] for t in trials}
        runs[name] = {seed: read_run(path) for seed, path in latest.items()}
    return runs


def _verdicts(comparison: Mapping[str, Any]) -> list[Verdict]:
    verdict = comparison["verdict"]
    if "arms" not in verdict:
        return [Verdict("open", comparison["state"], verdict["text"])]
    shown = []
    for part in verdict["arms"]:
        points = [*part["doubts"], *part["remarks"]]
        shown.append(Verdict(_TONES[part["reproduced"]], part["label"], part["headline"], points, verdict["scope"]))
    return shown


def number(value: float | None, digits: int = 2) -> str:
    """A ratio or loss for reading; a dash where it is unknown."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def interval_text(entry: Mapping[str, Any]) -> str:
    """`1.20 to 1.31`, or that there is none."""
    return "no interval" if entry["low"] is None else f"{entry['low']:.2f} to {entry['high']:.2f}"


def _interval_note(entry: Mapping[str, Any]) -> str:
    return "no interval" if entry["low"] is None else f"95% interval {interval_text(entry)}"


def _tiles(comparison: Mapping[str, Any]) -> list[Tile]:
    tiles = []
    many = len(comparison["arms"]) > 2
    for entry in comparison["ratios"]:
        of = f"{entry['arm']}: " if many else ""
        bound = entry["bound"]
        value = f"{bound['sign']} {bound['value']:.2f}×" if bound else f"{number(entry['mean'])}×"
        if entry["mean"] is None and not bound:
            value = "unknown"
        if entry["method"] == "in_run":
            tiles.append(Tile(f"{of}In-run ratio", value, "biased: along one run, before its decay has ended"))
            continue
        tiles.append(Tile(f"{of}Token ratio", value, f"{_interval_note(entry)}, {entry['num_seeds']} seeds"))
        clock = entry["wall_clock"]
        if clock["mean"] is not None:
            tiles.append(
                Tile(f"{of}Wall-clock ratio", f"{clock['mean']:.2f}×", f"{_interval_note(clock)}, this machine")
            )
        if (gap := _loss_gap(comparison, entry["arm"])) is not None:
            tiles.append(Tile(f"{of}Loss difference", f"{gap:+.3f}", "arm minus reference at equal tokens, nats"))
    return tiles


def _loss_gap(comparison: Mapping[str, Any], arm: str) -> float | None:
    """Mean paired difference of the end losses at the largest common budget."""
    ours, theirs = end_losses(comparison, arm), end_losses(comparison, comparison["reference"])
    gaps = []
    for seed in ours.keys() & theirs.keys():
        if common := ours[seed].keys() & theirs[seed].keys():
            gaps.append(ours[seed][max(common)] - theirs[seed][max(common)])
    return sum(gaps) / len(gaps) if gaps and all(map(math.isfinite, gaps)) else None


def _ratios(comparison: Mapping[str, Any], runs: Runs) -> Section:
    rows = []
    for entry in comparison["ratios"]:
        method = "end losses" if entry["method"] == "budget" else "in-run (biased)"
        for seed in entry["per_seed"]:
            shown = number(seed["ratio"], 3) if seed["censored"] is None else f"{seed['censored']} {seed['bound']:.3f}"
            tone: Tone = "" if seed["ratio"] is not None else "open"
            how = seed["note"] or (f"{seed['interpolated']}'s curve" if seed["interpolated"] else "outside")
            rows.append(
                cells(entry["arm"], method, str(seed["seed"]), Cell(shown, tone), number(seed["target_loss"], 4), how)
            )
    lead = (
        "The token ratio says how many times the arm's tokens the reference needs for the same loss. It is taken from "
        "the ends of separate runs, each with its own decayed schedule, paired by seed; the interval is a t-interval "
        "on the logarithms. Nothing is extrapolated: outside of the measured budgets only a bound is given. The in-run "
        "ratio compares a run that has not decayed yet with one that has: it is biased, and here for completeness."
    )
    columns = ("arm", "method", "seed", "ratio", "target loss", "interpolated")
    tables = [Table("Ratio of every seed", columns, rows, numeric=(2, 3, 4))] if rows else []
    pictures = comparison_figures.ratio(comparison, runs)
    return Section("How the ratio was measured", lead, pictures, tables, is_paired=True)


def _optima(comparison: Mapping[str, Any]) -> Table:
    rows = []
    for arm in comparison["arms"]:
        best = arm["best"]
        for key in ("lr", "aux_lr"):
            grid = ", ".join(f"{rate:g}" for rate in arm[key])
            if best is None:
                rows.append(cells(arm["name"], key, grid, "-", Cell("tuning unfinished", "open")))
                continue
            inside = best[f"{key}_is_interior"]
            where = Cell("interior", "good") if inside else Cell("at the edge of the grid: extend it", "bad")
            if len(arm[key]) == 1:
                where = Cell("not tuned: one value", "bad")
            rows.append(cells(arm["name"], key, grid, f"{best[key]:g}", where))
    return Table("Optima", ("arm", "rate", "grid", "best", "where"), rows, numeric=(3,))


def _cost(runs: Runs) -> Section:
    rows = []
    for arm, seeds in runs.items():
        typical = {
            key: [v for run in seeds.values() if (v := run.typical(key)) is not None]
            for key in ("tokens_per_s", "step_s", "optimizer_s", "optimizer_share")
        }
        if not all(typical.values()):
            continue
        mean = {key: sum(values) / len(values) for key, values in typical.items()}
        rows.append(
            cells(
                arm, f"{mean['tokens_per_s']:,.0f}", f"{1e3 * mean['step_s']:.1f} ms",
                f"{1e3 * mean['optimizer_s']:.1f} ms", f"{mean['optimizer_share']:.1%}",
            )
        )  # fmt: skip
    columns = ("arm", "tokens per second", "step", "optimizer", "optimizer's share")
    tables = (
        [Table("Medians of the largest runs, mean over seeds", columns, rows, numeric=(1, 2, 3, 4))] if rows else []
    )
    lead = "Time is that of this machine, with as many runs at a time as were configured; it says little about others."
    return Section("What a step costs", lead, tables=tables)


def _trials(comparison: Mapping[str, Any]) -> Table:
    rows = []
    merged: dict[str, dict[str, Any]] = {}
    for trial in comparison["trials"]:
        entry = merged.setdefault(trial["run_dir"], {**trial, "phases": []})
        entry["phases"].append(trial["phase"])
    for trial in merged.values():
        failed = trial["state"] == "failed"
        state = Cell(f"failed: {trial['error']}" if failed else trial["state"], "bad" if failed else "")
        rows.append(
            cells(
                trial["arm"], " and ".join(trial["phases"]), short_tokens(trial["budget_tokens"]), str(trial["seed"]),
                f"{trial['lr']:g}", f"{trial['aux_lr']:g}", number(trial["final_loss"], 4),
                short_seconds(trial["seconds"]) if trial["seconds"] else "-", state,
            )
        )  # fmt: skip
    columns = ("arm", "for", "tokens", "seed", "lr", "aux_lr", "end loss", "time", "state")
    return Table(f"{len(rows)} runs", columns, rows, numeric=(2, 3, 4, 5, 6, 7))


def _settings(comparison: Mapping[str, Any], runs: Runs, directory: Path) -> Section:
    environment = next((run.environment for seeds in runs.values() for run in seeds.values()), {})
    base = comparison["base"]
    return Section(
        "Settings and how to reproduce",
        "Every arm has the same model, data, data order for a seed, batch, schedule and number of tuning runs.",
        tables=[arm_differences(comparison["arms"]), environment_table(environment, base["data"]["path"])],
        blocks=[
            toml_block("Training configuration that all arms start from", base),
            reproduce_block("compare", directory),
        ],
    )
