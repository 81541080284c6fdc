"""The sections of a comparison's page that are mostly figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from muonlm.compare.analysis import end_losses
from muonlm.report import figures
from muonlm.report.page import Picture, Section, Table

if TYPE_CHECKING:
    from muonlm.report.comparison import Runs


def ratio(comparison: Mapping[str, Any], runs: Runs) -> list[Picture]:
    """End losses against budgets, with the construction of the ratio drawn in where there is only one to draw."""
    ends = {
        arm: [
            points
            for _, curve in sorted(end_losses(comparison, arm).items())
            if (points := [(t, loss) for t, loss in sorted(curve.items()) if math.isfinite(loss)])
        ]
        for arm in runs
    }
    if not any(ends.values()):
        return []
    entries = [entry for entry in comparison["ratios"] if entry["method"] == "budget"]
    drawn = entries[0] if len(entries) == 1 and entries[0]["mean"] is not None else None
    caption = "Each point is the end of a run with its own decayed schedule. Small: one seed. Large: the mean."
    arrow = " The arrow is the token ratio: the tokens at which the arm and the reference have the same loss."
    return [
        Picture(
            "end_loss", "End loss against budget", caption + (arrow if drawn else ""),
            f"End loss of {' and '.join(runs)} against the training budget, with the construction of the token ratio",
            figures.end_losses(ends, drawn),
        )
    ]  # fmt: skip


def losses(runs: Runs) -> Section:
    """Loss against tokens and against seconds of the largest runs."""
    if not any(runs.values()):
        return Section("Loss along the runs", "No final run is finished yet.")
    by_tokens = {
        arm: [[(t, loss) for t, _, loss in run.evals] for run in seeds.values()] for arm, seeds in runs.items()
    }
    by_time = {arm: [[(s, loss) for _, s, loss in run.evals] for run in seeds.values()] for arm, seeds in runs.items()}
    arms, ylabel = " and ".join(runs), "validation loss (nats per token)"
    pictures = [
        Picture(
            "loss_tokens", "Loss against tokens",
            "Runs of the largest budget. Thin: one line for each seed. Bold: their mean.",
            f"Validation loss of {arms} against training tokens",
            figures.curves(by_tokens, "training tokens", ylabel, crop=True, as_tokens=True),
        ),
        Picture(
            "loss_seconds", "Loss against time", "The same runs against seconds of training on this machine.",
            f"Validation loss of {arms} against training seconds",
            figures.curves(by_time, "training time (s)", ylabel, crop=True),
        ),
    ]  # fmt: skip
    return Section("Loss along the runs", figures=pictures)


def tuning(comparison: Mapping[str, Any], optima: Table) -> Section:
    """Tuning curves of both learning rates, with their optima."""
    pictures = []
    for key, title, name in (
        ("lr", "Learning rate of the hidden matrices", "tune_lr"),
        ("aux_lr", "Learning rate of embedding, head and norms", "tune_aux_lr"),
    ):
        sweeps, best, fixed = {}, {}, {}
        other = "aux_lr" if key == "lr" else "lr"
        arms = sorted(comparison["arms"], key=lambda arm: arm["name"] != comparison["reference"])
        for arm in arms:
            value = _fixed_rate(arm, other)
            points = [
                (t[key], t["final_loss"])
                for t in comparison["trials"]
                if (t["arm"], t["phase"], t[other]) == (arm["name"], "tune", value)
                and t["state"] in ("finished", "failed")
            ]
            sweeps[arm["name"]] = sorted(set(points), key=lambda point: point[0])
            fixed[arm["name"]] = f"{other} {value:g}" if value is not None else ""
            if arm["best"]:
                best[arm["name"]] = (arm["best"][key], arm["best"][f"{key}_is_interior"])
        if not any(sweeps.values()):
            continue
        pictures.append(
            Picture(
                name, title, "Ringed: the optimum. A cross at the top is a run that diverged.",
                f"Loss of the tuning runs of every arm against the {title.lower()}",
                figures.tuning(sweeps, best, key, fixed),
            )
        )  # fmt: skip
    lead = (
        "Every arm got the same number of tuning runs: first along lr, then along aux_lr at the best lr. An optimum at "
        "the edge of its grid may lie outside of it, and then the ratio means little: extend the grid first."
    )
    return Section("Tuning", lead, figures=pictures, tables=[optima])


def _fixed_rate(arm: Mapping[str, Any], key: str) -> float | None:
    """The value of `key` that stood still while the other rate was swept."""
    if key == "aux_lr":
        middle: float = arm["aux_lr"][(len(arm["aux_lr"]) - 1) // 2]
        return middle
    return arm["best"]["lr"] if arm["best"] else None


def norms(runs: Runs) -> Section:
    """Gradient norm and size of the updates of the hidden matrices."""
    pictures = []
    total = {
        arm: [[(r["tokens"], r["grad_norm"]) for r in run.train if "grad_norm" in r] for run in seeds.values()]
        for arm, seeds in runs.items()
    }
    update = {
        arm: [
            [(r["tokens"], r["update_rms"]["hidden"]) for r in run.train if "hidden" in r.get("update_rms", {})]
            for run in seeds.values()
        ]
        for arm, seeds in runs.items()
    }
    for name, title, caption, data in (
        ("grad_norm", "Gradient norm", "Over all parameters, before clipping.", total),
        (
            "update_rms",
            "Updates of the hidden matrices",
            "Root mean square of a step's change, weight decay included.",
            update,
        ),
    ):
        if any(points for seeds in data.values() for points in seeds):
            figure = figures.curves(data, "training tokens", title.lower(), as_tokens=True)
            pictures.append(Picture(name, title, caption, f"{title} against training tokens", figure))
    return Section("Gradients and updates", figures=pictures)


def effective_rank(spectra: Mapping[str, Any], arms: list[str]) -> Section:
    """Effective ranks of the final weights and of what training changed."""
    pictures = [
        Picture(
            name, title, caption, f"{title} by kind of hidden matrix for {' and '.join(arms)}",
            figures.effective_ranks(spectra["runs"], arms, key),
        )
        for name, title, caption, key in (
            (
                "rank_weights", "Effective rank of the weights", "1 means that all singular values are equal.",
                "effective_rank",
            ),
            (
                "rank_update", "Effective rank of the change", "Of the weights minus their initialisation.",
                "update_effective_rank",
            ),
        )
    ]  # fmt: skip
    return Section("Spectra of the hidden matrices", spectra["verdict"]["text"], figures=pictures)
