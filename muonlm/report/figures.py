"""The figures of a report, each one plot, drawn without any display."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from muonlm.compare.progress import short_tokens
from muonlm.report.runs import Points, mean_curve
from muonlm.report.svg import ARM_COLORS, GRID, INK, MUTED

SIZE = (5.4, 3.5)
_STYLE: dict[Any, Any] = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "axes.axisbelow": True, "axes.linewidth": 0.8, "legend.frameon": False, "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
}  # fmt: skip

Curves = Mapping[str, Sequence[Points]]
"""arm -> one curve for each seed; the reference comes first."""


@contextmanager
def _plot(xlabel: str, ylabel: str) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=SIZE)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        yield figure, axes


def curves(data: Curves, xlabel: str, ylabel: str, *, crop: bool = False, as_tokens: bool = False) -> Figure:
    """Every seed thin, the mean bold. `crop` leaves the steep beginning of a loss curve out of the picture."""
    with _plot(xlabel, ylabel) as (figure, axes):
        for color, (arm, seeds) in zip(ARM_COLORS, data.items()):
            seeds = [points for points in seeds if points]
            if len(seeds) > 1:
                for points in seeds:
                    axes.plot(*zip(*points), color=color, linewidth=0.8, alpha=0.4)
            if mean := mean_curve(seeds):
                axes.plot(*zip(*mean), color=color, linewidth=2.2, label=arm)
        if crop:
            _crop(axes, [points for seeds in data.values() for points in seeds if points])
        if as_tokens:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_tokens(x) if x else "0"))
        _legend(axes, len(data))
        return figure


def _crop(axes: Axes, all_points: Sequence[Points]) -> None:
    ends = [min(y for _, y in points) for points in all_points]
    early = [next((y for x, y in points if x >= 0.12 * points[-1][0]), points[0][1]) for points in all_points]
    if early and max(early) > min(ends):
        margin = 0.06 * (max(early) - min(ends))
        axes.set_ylim(min(ends) - margin, max(early) + margin)


def _legend(axes: Axes, count: int) -> None:
    if count > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", handlelength=1.6)


def end_losses(ends: Curves, ratio: Mapping[str, Any] | None) -> Figure:
    """End loss against budget, with `ratio` drawn in: the loss that both reach, and the tokens they need for it."""
    with _plot("training tokens of a run with its own decay", "end loss (nats per token)") as (figure, axes):
        budgets = sorted({x for seeds in ends.values() for points in seeds for x, _ in points})
        for color, (name, seeds) in zip(ARM_COLORS, ends.items()):
            for points in seeds:
                axes.plot(*zip(*points), color=color, linewidth=0.8, alpha=0.4, marker="o", markersize=2.5)
            if mean := mean_curve(seeds):
                axes.plot(*zip(*mean), color=color, linewidth=2.2, marker="o", markersize=6, label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(budgets))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_tokens(x)))
        axes.margins(x=0.12, y=0.12)
        _construction(axes, ratio)
        _legend(axes, len(ends))
        return figure


def _construction(axes: Axes, ratio: Mapping[str, Any] | None) -> None:
    measured = [s for s in (ratio or {}).get("per_seed", []) if s["ratio"] is not None]
    if ratio is None or not measured:
        return
    count = len(measured)
    target = sum(s["target_loss"] for s in measured) / count
    left, right = (
        math.exp(sum(math.log(s[key]) for s in measured) / count) for key in ("arm_tokens", "reference_tokens")
    )
    axes.axhline(target, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    bottom = axes.get_ylim()[0]
    for x in (left, right):
        axes.plot([x, x], [bottom, target], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    level = bottom + 0.12 * (target - bottom) if target > bottom else bottom
    axes.set_ylim(bottom=bottom)
    arrow = {"arrowstyle": "<->", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(right, level), xytext=(left, level), arrowprops=arrow)
    axes.annotate(
        f"{ratio['mean']:.2f}×", xy=(math.sqrt(left * right), level), xytext=(0, 4), textcoords="offset points",
        ha="center", va="bottom", fontsize=11, fontweight="bold",
    )  # fmt: skip
    axes.annotate(
        f"same loss {target:.3f}", xy=(math.sqrt(left * right), target), xytext=(0, 3),
        textcoords="offset points", color=MUTED, fontsize=8.5, ha="center",
    )  # fmt: skip


def tuning(
    sweeps: Mapping[str, Sequence[tuple[float, float | None]]],
    best: Mapping[str, tuple[float, bool]],
    xlabel: str,
    fixed: Mapping[str, str],
) -> Figure:
    """End loss of the tuning runs against one learning rate; the optimum of each arm ringed, and named when at an edge.

    A loss of None is a run that diverged: it stands as a cross above the others.
    """
    with _plot(xlabel, "loss of the tuning run (nats per token)") as (figure, axes):
        rates = sorted({rate for points in sweeps.values() for rate, _ in points})
        for color, (arm, points) in zip(ARM_COLORS, sweeps.items()):
            done = [(rate, loss) for rate, loss in points if loss is not None]
            if done:
                label = f"{arm} ({fixed[arm]})" if arm in fixed else arm
                axes.plot(*zip(*done), color=color, linewidth=1.6, marker="o", markersize=5, label=label)
            for rate in [rate for rate, loss in points if loss is None]:
                axes.plot(rate, 0.97, "x", color=color, markersize=8, transform=axes.get_xaxis_transform())
            if arm in best and (loss := dict(done).get(best[arm][0])) is not None:
                rate, is_interior = best[arm]
                axes.plot(rate, loss, "o", color=color, markersize=12, fillstyle="none", markeredgewidth=1.6)
                if not is_interior:
                    axes.annotate(
                        "edge of the grid", xy=(rate, loss), xytext=(0, -9), textcoords="offset points", color=color,
                        ha="left" if rate == points[0][0] else "right", va="top", fontsize=8.5, fontweight="bold",
                    )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(rates))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
        if len(rates) > 6:
            axes.tick_params(axis="x", labelrotation=40)
        axes.margins(x=0.08, y=0.16)
        _legend(axes, 2)
        return figure


def effective_ranks(runs: Sequence[Mapping[str, Any]], arms: Sequence[str], key: str) -> Figure:
    """Effective rank of each kind of hidden matrix, a bar for each arm, mean over its seeds with the seeds as dots."""
    with _plot("", "effective rank / smaller side") as (figure, axes):
        kinds = list(runs[0]["kinds"])
        width = 0.8 / len(arms)
        for index, (color, arm) in enumerate(zip(ARM_COLORS, arms)):
            members = [run["kinds"] for run in runs if run["arm"] == arm]
            places = [k + (index - (len(arms) - 1) / 2) * width for k in range(len(kinds))]
            means = [sum(run[kind][key] for run in members) / len(members) for kind in kinds]
            axes.bar(places, means, width * 0.92, color=color, label=arm)
            for run in members:
                axes.plot(places, [run[kind][key] for kind in kinds], ".", color=INK, markersize=2.5, alpha=0.7)
        axes.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds])
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 1)
        _legend(axes, len(arms))
        return figure
