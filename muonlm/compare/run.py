"""`compare`: run what a comparison needs, as often interrupted as it may be, and write `compare.json`."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from muonlm.compare import workers
from muonlm.compare.analysis import ratios_of
from muonlm.compare.progress import Display
from muonlm.compare.record import locked, read_record, recall
from muonlm.compare.trials import (
    Arm,
    Trial,
    base_config,
    check_tuning_budget,
    flatten,
    plan_arms,
    train_configs,
    trial_config,
)
from muonlm.compare.verdict import decide, scope_of
from muonlm.compare.workers import Outcome, Stop
from muonlm.config.compare import CompareConfig
from muonlm.config.errors import UserError
from muonlm.config.load import apply_overrides, dump_toml, validate
from muonlm.config.schema import TrainConfig
from muonlm.data.prepare import prepare_if_missing

SCHEMA_VERSION = 1

# What may differ between two invocations without making finished runs worthless.
_FREE = ("name", "run_dir", "seed", "loop.tokens", "loop.steps", "loop.threads", "optim.lr", "optim.aux.lr")
_FREE_TABLES = ("track.", "dist.", "checkpoint.", "loop.micro_batch_size", "data.prepare", "data.verify")


def compare(config: CompareConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Run the comparison and return what is in its compare.json.

    Finished runs are taken as they are, interrupted ones go on. Grids, seeds and budgets may grow between two calls. On
    SIGINT or SIGTERM the running trials save and stop, and the state is "interrupted". Raises UserError for an unfair
    or changed configuration, for an arm whose runs all diverged, for a directory that is damaged or that another
    process runs a comparison in, for a worker that died, and for what the training loop refuses.
    """
    comparison = _Comparison(config)
    with locked(comparison.directory):
        return comparison.run(console)


class _Comparison:
    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.directory = Path(config.resolved_output_dir)
        self.arms = plan_arms(config)
        self.decided: dict[str, str] = {}
        largest = {"name": config.name, "loop.tokens": max(config.budgets_tokens)}
        self.base = validate(TrainConfig, apply_overrides(base_config(config), largest), config.base)
        check_tuning_budget(config, self.base.batch_tokens)
        self.raws = train_configs(config)
        self.first_configs = {arm.name: self._train_config(arm.lr_sweep()[0]) for arm in self.arms}
        self.outcomes: dict[tuple[str, int, int, float, float], Outcome] = {}
        self.failed_before: dict[str, str] = {}
        self.looked_up: set[str] = set()

    # --- what there is to do

    @property
    def losses(self) -> dict[tuple[str, int, int, float, float], float]:
        return {p: math.inf if o.final_loss is None else o.final_loss for p, o in self.outcomes.items()}

    def _pending(self) -> list[Trial]:
        """Trials known to be needed and not done, the longest first; those already on disk are taken in on the way."""
        while True:
            losses = self.losses
            for arm in self.arms:
                arm.check_not_failed(losses)
            needed = [t for arm in self.arms for t in arm.all_trials(losses) if t.point not in self.outcomes]
            unique = list({trial.point: trial for trial in reversed(needed)}.values())[::-1]
            unknown = [trial for trial in unique if trial.directory not in self.looked_up]
            recalled = {t.point: o for t in unknown if (o := self._recall(t)) is not None}
            if not recalled:
                return sorted(unique, key=lambda trial: -trial.budget_tokens)
            self.outcomes |= recalled

    def _recall(self, trial: Trial) -> Outcome | None:
        """The outcome of an earlier invocation. Each run is looked up once: from then on only this one trains it."""
        self.looked_up.add(trial.directory)
        run_dir = self.directory / trial.directory
        return recall(run_dir, self._train_config(trial), self.failed_before.get(trial.directory))

    def _train_config(self, trial: Trial, threads: int = 0) -> TrainConfig:
        decided = {**self.decided, "loop.threads": threads}
        return trial_config(self.raws[trial.arm], trial, self.directory, self.config.name, decided)

    # --- running

    def run(self, console: Console | None) -> dict[str, Any]:
        self._take_up()
        pending = self._pending()
        (self.directory / "config.toml").write_text(dump_toml(self.config))
        if pending:
            prepare_if_missing(self.base.data)
        total = sum(arm.total_tokens for arm in self.arms)
        done = sum(trial.budget_tokens for trial in self._runs() if trial.point in self.outcomes)
        with Display(self.config.name, total, done, console) as display:
            if done:
                display.say(f"{len(self.outcomes)} finished runs found in {self.directory}")
            is_complete = not pending or self._run_pending(display)
            state = "finished" if is_complete else "interrupted"
            if not is_complete:
                display.say(
                    f"Interrupted. Everything is saved in {self.directory}; the same command goes on from here."
                )
        return self._write(state)

    def _run_pending(self, display: Display) -> bool:
        """Run until nothing is pending; False when stopped before that."""
        loop = self.base.loop
        jobs, threads = workers.choose_jobs(self.config, loop.device, loop.threads)
        self._write("running")
        stop = workers.new_stop()
        log = self.directory / "logs" / "workers.log"
        running: dict[Future[Outcome], Trial] = {}
        swept: set[tuple[str, str]] = set()
        with workers.make_pool(jobs, stop, log) as pool, _caught_signals(display) as signals:
            try:
                while True:
                    if signals.asked and not stop.value:
                        stop.value = Stop.SAVE
                        display.say("Stopping: running trials save and stop. Once more to leave at once.")
                    busy = {trial.point for trial in running.values()}
                    ready = [] if stop.value else [t for t in self._pending() if t.point not in busy]
                    for trial in ready[: jobs - len(running)]:
                        running[pool.submit(workers.run_trial, self._train_config(trial, threads))] = trial
                    if not running:
                        return stop.value == Stop.GO_ON
                    finished, _ = wait(running, timeout=0.4, return_when=FIRST_COMPLETED)
                    for future in finished:
                        if not self._take(running.pop(future), future.result(), display):
                            stop.value = Stop.SAVE
                    if finished:
                        self._show_sweeps(display, swept)
                        self._write("running")
                    display.update((trial, self.directory / trial.directory) for trial in running.values())
            except BaseException as error:
                is_broken = isinstance(error, BrokenProcessPool)
                stop.value = Stop.LEAVE if is_broken else Stop.SAVE
                wait(running)
                self._write("interrupted")
                if is_broken:
                    fewer = f" (fewer runs at a time: jobs = {jobs - 1})" if jobs > 1 else ""
                    raise UserError(
                        f"A worker process died, perhaps for lack of memory; see {log}. The same command "
                        f"goes on{fewer}."
                    ) from None
                raise

    def _take(self, trial: Trial, outcome: Outcome, display: Display) -> bool:
        """Note what became of a trial; False where it was stopped."""
        if outcome.state == "error":
            if outcome.is_user_error:
                raise UserError(f"{trial.directory}: {outcome.error}")
            raise RuntimeError(f"{trial.directory} stopped with an error:\n{outcome.error}")
        if outcome.state == "preempted":
            return False
        self.outcomes[trial.point] = outcome
        display.finished(trial, "diverged", outcome.final_loss, outcome.seconds)
        return True

    def _show_sweeps(self, display: Display, shown: set[tuple[str, str]]) -> None:
        losses = self.losses
        for arm in self.arms:
            for key, sweep in (("lr", arm.lr_sweep()), ("aux_lr", arm.aux_lr_sweep(losses))):
                is_done = sweep and all(trial.point in losses for trial in sweep)
                if is_done and (arm.name, key) not in shown:
                    shown.add((arm.name, key))
                    display.sweep(arm, key, sweep, losses)

    # --- the record

    def _runs(self) -> list[Trial]:
        """One trial for each run: a final run that tuning already did stands as tuning."""
        trials = [trial for arm in self.arms for trial in arm.all_trials(self.losses)]
        return list({trial.point: trial for trial in reversed(trials)}.values())[::-1]

    def _write(self, state: str) -> dict[str, Any]:
        losses = self.losses
        directories = {trial.point: trial.directory for trial in self._runs()}
        trials = [self._trial_entry(t, directories[t.point]) for arm in self.arms for t in arm.all_trials(losses)]
        entry: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "name": self.config.name,
            "reference": self.config.reference,
            "state": state,
            "base": self.base.model_dump(),
            "decided": self.decided,
            "arms": [self._arm_entry(arm) for arm in self.arms],
            "trials": trials,
            "ratios": [],
            "verdict": {"text": f"The comparison is {state}; there is no verdict yet.", "reproduced": None},
        }
        if state == "finished":
            entry["ratios"] = ratios_of(entry, self.directory)
            scope = scope_of(self.base, max(trial.budget_tokens for trial in self._runs()))
            entry["verdict"] = decide(entry["ratios"], entry["arms"], self.config.reference, scope)
        temporary = self.directory / "compare.json.tmp"
        temporary.write_text(json.dumps(entry, indent=1, allow_nan=False))
        os.replace(temporary, self.directory / "compare.json")
        return entry

    def _trial_entry(self, trial: Trial, run_dir: str) -> dict[str, Any]:
        outcome = self.outcomes.get(trial.point)
        if outcome is None:
            outcome = Outcome("interrupted" if (self.directory / run_dir).exists() else "pending")
        return {
            **asdict(trial),
            "run_dir": run_dir,
            "state": outcome.state,
            "final_loss": outcome.final_loss,
            "seconds": outcome.seconds,
            "tokens": outcome.tokens,
            "error": outcome.error,
        }

    def _arm_entry(self, arm: Arm) -> dict[str, Any]:
        best = arm.best(self.losses)
        changes = next(a.set for a in self.config.arms if a.name == arm.name)
        return {
            "name": arm.name,
            "set": flatten(changes),
            "lr": list(arm.lr),
            "aux_lr": list(arm.aux_lr),
            "budgets_tokens": list(arm.budgets_tokens),
            "best": asdict(best) if best else None,
            "config": self.first_configs[arm.name].model_dump(),
        }

    def _take_up(self) -> None:
        """Go on from the record of an earlier invocation. Raises UserError where its runs had other settings."""
        old = read_record(self.directory)
        for arm in old.arms:
            if arm.name not in self.first_configs:
                continue
            before, now = _fixed(arm.config), _fixed(self.first_configs[arm.name].model_dump())
            changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            if changed:
                lines = "\n".join(f"  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
                raise UserError(
                    f"{self.directory} holds a comparison with other settings for arm {arm.name}:\n{lines}\n"
                    "Choose another name or output_dir, or remove that directory. Grids, seeds and budgets may change."
                )
        self.failed_before = {t.run_dir: t.error or "diverged" for t in old.trials if t.state == "failed"}
        self.decided = old.decided or workers.decide_precision(self.base)


def _fixed(train: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flatten(train).items() if k not in _FREE and not k.startswith(_FREE_TABLES)}


@dataclass
class _Signals:
    asked: bool = False


@contextmanager
def _caught_signals(display: Display) -> Iterator[_Signals]:
    """Notes the first SIGINT or SIGTERM; the second leaves at once, and the workers save and follow.

    The handler only sets a flag: the code that it interrupts may be in the middle of anything.
    """
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def handle(signum: int, frame: object) -> None:
        if signals.asked:
            display.console.show_cursor(True)
            os._exit(128 + signum)
        signals.asked = True

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
