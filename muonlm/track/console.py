"""Progress on standard output: a live bar on a terminal, one plain line a record elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, TextIO

_log = logging.getLogger(__name__)


class ConsoleSink:
    """Shows steps, loss, tokens/s, remaining time and the latest evaluation loss."""

    def __init__(self, name: str, num_steps: int, start_step: int, stream: TextIO | None = None) -> None:
        self._is_gone = stream is None and sys.stdout is None  # closed before the start
        self._stream: TextIO = stream or sys.stdout
        self._num_steps = num_steps
        is_terminal = not self._is_gone and self._stream.isatty()
        self._bar: _Bar | None = _Bar(name, num_steps, start_step, self._stream) if is_terminal else None

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Show one record; a terminal or pipe that has gone is no reason to stop the run."""
        if self._is_gone:
            return
        try:
            self._show(kind, record)
        except OSError as error:
            self._is_gone = True
            _log.info("standard output has gone (%s): nothing more is shown there", error)

    def _show(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind == "train" and self._bar is not None:
            self._bar.update(record["step"], record["loss"], record["tokens_per_s"])
            return
        if kind == "eval" and self._bar is not None:
            self._bar.eval_loss = record["loss"]
        line = {"train": self._train_line, "eval": _eval_line, "event": _event_line}[kind](record)
        if self._bar is not None:
            self._bar.print(line)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()

    def _train_line(self, record: Mapping[str, Any]) -> str:
        left = timedelta(seconds=round((self._num_steps - record["step"]) * record["step_s"]))
        return (
            f"step {record['step']}/{self._num_steps}  loss {record['loss']:.4f}  "
            f"{record['tokens_per_s']:,.0f} tokens/s  optimizer {record['optimizer_share']:.0%}  eta {left}"
        )


class _Bar:
    """rich's progress bar with the columns of a training run."""

    def __init__(self, name: str, num_steps: int, start_step: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.eval_loss: float | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._task = self._progress.add_task(name, total=num_steps, completed=start_step, numbers="")
        self._progress.start()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        evaluated = "" if self.eval_loss is None else f"  eval {self.eval_loss:.4f}"
        numbers = f"loss {loss:.4f}{evaluated}  {tokens_per_s:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, numbers=numbers)

    def print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


def _eval_line(record: Mapping[str, Any]) -> str:
    ratio = record.get("tokens_ratio")
    return (
        f"step {record['step']}  {'final ' if record['final'] else ''}eval loss {record['loss']:.4f}  "
        f"{record['bits_per_byte']:.4f} bits/byte on {record['eval_tokens']:,} tokens"
        + ("" if ratio is None else f"  tokens ratio {ratio:.2f}")
    )


def _event_line(record: Mapping[str, Any]) -> str:
    details = "  ".join(f"{key} {value}" for key, value in record["details"].items())
    return f"step {record['step']}  {record['event']}  {details}".rstrip()
