"""What a comparison shows while it runs: an overall bar with the time left, a bar per running trial, results as lines.

On anything but a terminal only the lines are printed, each with the share done and the time left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from muonlm.compare.trials import Arm, Losses, Trial


def short_tokens(tokens: float) -> str:
    """1.05M, 98.3k: tokens with three digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.3g}"


def short_seconds(seconds: float) -> str:
    """1 h 20 min, 3 min, 12 s."""
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def tokens_so_far(run_dir: Path) -> int:
    """Tokens that a run has trained on by its last metric record; 0 before there is one. Reads only the file's end."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 8192))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["tokens"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


class Display:
    """Live progress of a comparison. Use as a context manager."""

    def __init__(self, name: str, total_tokens: int, done_tokens: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total, self.start_tokens, self.done_tokens = total_tokens, done_tokens, done_tokens
        self.partial_tokens = 0
        self.started = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=600,
            disable=not self.console.is_terminal,
        )
        self.overall = self.progress.add_task(name, total=total_tokens, completed=done_tokens, count="")
        self.bars: dict[Trial, TaskID] = {}

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, running: Iterable[tuple[Trial, Path]]) -> None:
        """Redraw: bars of trials that run now, and the overall bar."""
        current = dict(running)
        for trial in [t for t in self.bars if t not in current]:
            self.progress.remove_task(self.bars.pop(trial))
        partial = 0
        for trial, run_dir in current.items():
            tokens = min(tokens_so_far(run_dir), trial.budget_tokens)
            partial += tokens
            if trial not in self.bars:
                self.bars[trial] = self.progress.add_task("  " + describe(trial), total=trial.budget_tokens, count="")
            self._set(self.bars[trial], tokens, trial.budget_tokens)
        self.partial_tokens = partial
        self._set(self.overall, self.done_tokens + partial, self.total)

    def _set(self, task: TaskID, tokens: int, total: int) -> None:
        count = f"{short_tokens(tokens)}/{short_tokens(total)} tokens"
        self.progress.update(task, completed=tokens, total=total, count=count)

    def finished(self, trial: Trial, state: str, loss: float | None, seconds: float | None) -> None:
        """Print the result of a trial."""
        self.done_tokens += trial.budget_tokens
        self.partial_tokens = max(0, self.partial_tokens - trial.budget_tokens)
        result = f"loss {loss:.4f}" if loss is not None else f"[red]{state}[/red]"
        took = f" in {short_seconds(seconds)}" if seconds else ""
        share = f"{self.done_tokens / max(1, self.total):4.0%}"
        line = f"{share}  {describe(trial)}: {result}{took}{self._left()}"
        self.console.print(line, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        # What other trials have done so far counts, or with several at a time the first estimates are far too long.
        now = self.done_tokens + self.partial_tokens
        done, elapsed, left = now - self.start_tokens, time.monotonic() - self.started, self.total - now
        if self.console.is_terminal or done <= 0 or left <= 0:
            return ""
        return f", about {short_seconds(elapsed / done * left)} left"

    def sweep(self, arm: Arm, key: str, trials: Sequence[Trial], losses: Losses) -> None:
        """Print the table of a finished sweep, its optimum marked."""
        fixed = "aux_lr" if key == "lr" else "lr"
        self.console.print(f"[bold]{arm.name}: {key} at {fixed} {getattr(trials[0], fixed):g}", highlight=False)
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column(key, justify="right")
        table.add_column("loss", justify="right")
        table.add_column("")
        best = min(trials, key=lambda t: losses[t.point])
        for index, trial in enumerate(trials):
            loss = losses[trial.point]
            note = ""
            if trial is best and loss < float("inf"):
                edge = index in (0, len(trials) - 1)
                note = "[yellow]best, at the edge of the grid[/yellow]" if edge else "[green]best[/green]"
            table.add_row(f"{getattr(trial, key):g}", "diverged" if loss == float("inf") else f"{loss:.4f}", note)
        self.console.print(table)

    def say(self, text: str) -> None:
        """Print one line of plain text."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def describe(trial: Trial) -> str:
    """One line that names a trial."""
    phase = "tune " if trial.phase == "tune" else "final"
    budget = short_tokens(trial.budget_tokens)
    return f"{trial.arm:<8} {phase} {budget:>6} tokens seed {trial.seed} lr {trial.lr:g} aux {trial.aux_lr:g}"
