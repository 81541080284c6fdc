"""One object that every record of a run goes through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from muonlm.config.schema import TrainConfig
from muonlm.track.console import ConsoleSink
from muonlm.track.metrics import MetricsWriter
from muonlm.track.ratio import ReferenceCurve
from muonlm.track.services import TensorBoardSink, WandbSink


class Sink(Protocol):
    """Somewhere that records go besides metrics.jsonl."""

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Take one record of `kind` "train", "eval" or "event"."""

    def close(self) -> None:
        """Finish."""


class Tracker:
    """Writes records to metrics.jsonl and to what `config.track` asks for; does nothing on other ranks than the main.

    Records of later steps than `start_step`, left by an attempt that was killed, are removed first. Raises UserError
    when a package or the reference run is missing.
    """

    def __init__(
        self, config: TrainConfig, run_dir: str | Path, *, is_main: bool, num_steps: int, start_step: int = 0
    ) -> None:
        self._writer: MetricsWriter | None = None
        self._reference: ReferenceCurve | None = None
        self._ratio: float | None = None
        self._sinks: list[Sink] = []
        if not is_main:
            return
        run_dir = Path(run_dir)
        track = config.track
        if track.reference is not None:
            self._reference = ReferenceCurve.from_run(track.reference)
        if track.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir, start_step))
        if track.wandb != "off":
            self._sinks.append(WandbSink(config, run_dir))
        self._writer = MetricsWriter(run_dir)
        self._writer.truncate_after(start_step)
        if track.console:
            self._sinks.append(ConsoleSink(config.name, num_steps, start_step))

    def train(self, record: Mapping[str, Any]) -> None:
        """A record of kind "train"."""
        self._write("train", record)

    def eval(self, record: Mapping[str, Any]) -> None:
        """A record of kind "eval"; `tokens_ratio` is added when there is a reference run.

        The ratio of the evaluation at the end is that of the evaluation along the way at the same step, because the
        reference's curve is made of those and another set of sequences has another loss.
        """
        if self._reference is not None:
            if not record["final"]:
                self._ratio = self._reference.tokens_ratio(record["loss"], record["tokens"])
            record = {**record, "tokens_ratio": self._ratio}
        self._write("eval", record)

    def event(self, record: Mapping[str, Any]) -> None:
        """A record of kind "event"."""
        self._write("event", record)

    def sync(self) -> None:
        """Put the records on the disk, before a checkpoint is written."""
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, kind: str, record: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(kind, record)
            for sink in self._sinks:
                sink.write(kind, record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
