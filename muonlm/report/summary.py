"""The result of a comparison on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from muonlm.report.comparison import arm_names, interval_text, number

_STYLES = {True: "green", False: "red", None: "yellow"}


def summary(comparison: Mapping[str, Any]) -> RenderableType:
    """Verdict, ratios and optima, to be printed by rich; `comparison` is what is in compare.json."""
    return Group(_verdict(comparison), *([_ratios(comparison)] if comparison["ratios"] else []), _optima(comparison))


def _verdict(comparison: Mapping[str, Any]) -> Panel:
    verdict = comparison["verdict"]
    text = Text()
    for part in verdict.get("arms", []):
        text.append(f"{part['label']}. {part['headline']}\n", style=f"bold {_STYLES[part['reproduced']]}")
        for point in part["doubts"]:
            text.append(f"- {point}\n", style="yellow")
        for point in part["remarks"]:
            text.append(f"- {point}\n")
    text.append(verdict.get("scope", "" if verdict.get("arms") else verdict["text"]), style="dim")
    return Panel(text, title=comparison["name"], title_align="left", border_style=_STYLES[verdict["reproduced"]])


def _ratios(comparison: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("tokens", "ratio", "95% interval", "in time", "95% interval"):
        table.add_column(column, justify="left" if column == "tokens" else "right")
    for entry in comparison["ratios"]:
        bound, clock = entry["bound"], entry["wall_clock"]
        method = "end losses" if entry["method"] == "budget" else "in-run, biased"
        ratio = f"{bound['sign']} {bound['value']:.2f}" if bound else number(entry["mean"])
        label = f"{comparison['reference']} / {entry['arm']} ({method})"
        table.add_row(label, ratio, interval_text(entry), number(clock["mean"]), interval_text(clock))
    return table


def _optima(comparison: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("arm", "best lr", "best aux_lr", "tuned loss", ""):
        table.add_column(column, justify="right" if column.startswith(("best", "tuned")) else "left")
    arms = {arm["name"]: arm for arm in comparison["arms"]}
    for name in arm_names(comparison):
        best = arms[name]["best"]
        if best is None:
            table.add_row(name, "-", "-", "-", "tuning unfinished")
            continue
        edges = [key for key in ("lr", "aux_lr") if not best[f"{key}_is_interior"]]
        note = f"[yellow]{' and '.join(edges)} at the edge of the grid: extend it[/yellow]" if edges else "interior"
        table.add_row(name, f"{best['lr']:g}", f"{best['aux_lr']:g}", f"{best['loss']:.4f}", note)
    return table
