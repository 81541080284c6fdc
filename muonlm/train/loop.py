"""The training loop: restore or start, then accumulate, step, record, evaluate, save, until the end or a signal."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from muonlm.checkpoint import store
from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.data.manifest import MANIFEST_NAME
from muonlm.data.prepare import prepare_if_missing
from muonlm.dist import collectives, process
from muonlm.dist.agree import on_main, raised_on_all_ranks
from muonlm.dist.process import World
from muonlm.optim.rules_table import rules_summary
from muonlm.track.tracker import Tracker
from muonlm.train.branch import Branch, find_branch
from muonlm.train.evaluate import evaluate
from muonlm.train.preemption import StopSignals
from muonlm.train.records import Meter, eval_record, event_record
from muonlm.train.run_dir import Progress, RunDirectory, RunStatus, check_same_data
from muonlm.train.setup import Parts, build
from muonlm.train.step import Diverged, check_finite, take_step

__all__ = ["RunStatus", "train"]


def train(config: TrainConfig, *, fresh: bool = False, stop: StopSignals | None = None) -> RunStatus:
    """Train the run that `config` describes, or go on with it; returns when it is finished or was asked to stop.

    The run directory is the only state: repeating the call goes on after the last checkpoint with the same numbers,
    on any number of ranks, and returns at once for a finished run. `fresh` discards what is there. SIGINT, SIGTERM and
    SIGUSR1, on any rank, save a checkpoint after the step under way and return a "preempted" status on all ranks.
    `stop` is for a program that has its handlers installed already: a signal that came before the first step counts,
    and one that comes while data is prepared ends the process.
    Raises UserError for wrong input (before the first step), a full disk, and a loss or gradient that is not finite.
    """
    # Before there is a process group, whose timeout a long preparation would overrun.
    if stop is not None and not (Path(config.data.path) / MANIFEST_NAME).is_file():
        stop.set_at_once(True)
    prepare_if_missing(config.data, progress=os.environ.get("RANK", "0") == "0")
    if stop is not None:
        stop.set_at_once(False)
    with StopSignals() if stop is None else nullcontext(stop) as signals:
        world = process.start(config.dist, config.loop.device)
        try:
            if fresh:  # before it removes anything
                on_main(lambda: find_branch(config))
            with RunDirectory(config, world, fresh=fresh) as run, _lost_ranks(world, run):
                return run.finished or _train(config, world, run, signals)
        finally:
            process.shutdown()


@contextmanager
def _lost_ranks(world: World, run: RunDirectory) -> Iterator[None]:
    """Say what it means that gloo lost a peer: that rank ended or hangs, and its own message has the reason."""
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in ("closed by peer", "reset by peer", "Broken pipe", "Timed out")):
            raise
        raise UserError(
            f"rank {world.rank}: another rank has ended or hangs, and its message says why; see also "
            f"{run.path / 'logs'}"
        ) from error


def _train(config: TrainConfig, world: World, run: RunDirectory, stop: StopSignals) -> RunStatus:
    checkpoint = on_main(lambda: store.latest(run.path))
    init_from = config.init_from if checkpoint is None else None
    branch = on_main(lambda: find_branch(config)) if checkpoint is None else None
    parts = build(config, world, run.recorded, init_from)
    if init_from is not None:
        check_finite(parts, 0, f"as loaded from {init_from}")
    progress = _restore(parts, checkpoint, branch, run.recorded)
    _show_rules(parts, run)
    with _open_tracker(parts, run, progress) as tracker:
        run.begin(parts.environment, parts.rules)
        run.update("running", progress)
        begun = "branch" if branch is not None else "resume" if progress.step else "start"
        tracker.event(event_record(progress, begun, attempt=run.attempt, **_origin(branch)))
        if branch is not None:  # from here on the other run is not needed, and what it does makes no difference
            _save(parts, progress, run, tracker)
        meter, stopping = Meter(parts), collectives.any_rank(stop.requested)
        while progress.step < config.num_steps and not stopping:
            number = progress.step + 1
            is_last = number == config.num_steps
            is_recorded = number == 1 or is_last or _is_due(number, config.track.interval_steps)
            result = take_step(parts, progress.step, progress.sequences, measure=is_recorded, stop=stop.requested)
            meter.add(result, progress)
            stopping = result.stop
            if result.is_skipped:
                tracker.event(event_record(progress, "skipped"))
            elif is_recorded:
                tracker.train(meter.train_record(result, progress))
            if is_recorded:
                run.update("running", progress)
            if is_last or _is_due(number, config.eval.interval_steps):
                _evaluate(parts, progress, tracker, is_last=is_last)
            if is_last or stopping or _is_due(number, config.checkpoint.interval_steps):
                _save(parts, progress, run, tracker)
        if progress.step < config.num_steps:
            tracker.event(event_record(progress, "preempted", signal=stop.name or "of another rank"))
            return run.end("preempted", progress)
        tracker.event(event_record(progress, "finished", final_loss=progress.final_loss))
        return run.end("finished", progress)


def _restore(parts: Parts, checkpoint: Path | None, branch: Branch | None, recorded: Mapping[str, Any]) -> Progress:
    """Load the run's own checkpoint, or that of the run which it branches off; the same on all ranks."""
    if checkpoint is not None:
        check_same_data(
            recorded,
            parts.environment,
            f"{parts.config.data.path} holds other data than when this run began; restore them, or start a run of "
            "another name",
        )
        return Progress(**store.load(checkpoint, parts.contents))
    if branch is None:
        return Progress()
    branch.check_data(parts.environment)
    advice = "A branch needs the same rule for each parameter: optim.overrides and momentum as they were"
    extra = store.load(branch.path, parts.contents, with_optimizer=branch.with_optimizer, advice=advice)
    return Progress(**{**extra, "final_loss": None})


def _origin(branch: Branch | None) -> dict[str, Any]:
    return {} if branch is None else {"path": str(branch.path), "optimizer": "kept" if branch.with_optimizer else "new"}


def _show_rules(parts: Parts, run: RunDirectory) -> None:
    """The rules by group: rules.txt has a line for each parameter, and for each matrix of the exchange plan."""
    if parts.world.is_main and parts.config.track.console:
        with suppress(OSError):  # a terminal or pipe that has gone is no reason to stop the run
            print(f"{rules_summary(parts.rules)}\neach parameter and matrix: {run.path / 'rules.txt'}", flush=True)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _open_tracker(parts: Parts, run: RunDirectory, progress: Progress) -> Tracker:
    with raised_on_all_ranks():
        return Tracker(
            parts.config,
            run.path,
            is_main=parts.world.is_main,
            num_steps=parts.config.num_steps,
            start_step=progress.step,
        )


def _evaluate(parts: Parts, progress: Progress, tracker: Tracker, *, is_last: bool) -> None:
    """Evaluate and record; at the end on the sequences along the way, if those are used, and then on the final ones."""
    eval_config, track = parts.config.eval, parts.config.track
    if not is_last or eval_config.interval_steps or track.reference is not None:
        tracker.eval(_measure(parts, progress, parts.eval_indices, final=False))
    if is_last:
        record = _measure(parts, progress, parts.final_indices, final=True)
        progress.final_loss = record["loss"]
        tracker.eval(record)


def _measure(parts: Parts, progress: Progress, indices: np.ndarray, *, final: bool) -> dict[str, Any]:
    loss = evaluate(
        parts.model,
        parts.validation_data,
        indices,
        batch_size=parts.micro_batch,
        mesh=parts.mesh,
        dtype=parts.dtype,
    )
    if not math.isfinite(loss):
        raise Diverged(f"step {progress.step}: the validation loss is not finite; lower the learning rates")
    return eval_record(parts, progress, loss, len(indices), final=final)


def _save(parts: Parts, progress: Progress, run: RunDirectory, tracker: Tracker) -> None:
    """Save a checkpoint; the records up to it are on the disk before."""
    begin = time.perf_counter()
    check_finite(parts, progress.step)
    tracker.sync()
    path = store.save(run.path, progress.step, parts.contents, asdict(progress), parts.config.checkpoint.keep)
    seconds = round(time.perf_counter() - begin, 3)
    tracker.event(event_record(progress, "checkpoint", path=str(path.relative_to(run.path)), seconds=seconds))
