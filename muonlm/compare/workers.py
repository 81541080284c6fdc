"""Worker processes that run trials: started once, importing torch once, leaving with the process that started them.

Workers run in sessions of their own, so that Ctrl-C on a terminal reaches only the main process, which then asks the
workers that are busy to save and stop (SIGTERM, which the training loop handles). The same happens when the main
process vanishes. They are asked by a number in shared memory that they poll: it has no lock, which a worker killed for
lack of memory could take with it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from ctypes import c_byte
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

from muonlm.config.compare import CompareConfig
from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig


class Stop(IntEnum):
    """What the main process asks of the workers of a pool."""

    GO_ON = 0
    SAVE = 1
    """Save what runs and report it."""
    LEAVE = 2
    """Save what runs and end: nothing can be reported, since another worker has died and the pool is broken."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial. "failed": it diverged and would again; "error": something else, which stops all."""

    state: str
    final_loss: float | None = None
    seconds: float | None = None
    tokens: int = 0
    error: str | None = None
    is_user_error: bool = False


class _Stopped(BaseException):
    """A stop was asked for while the training loop did not handle signals yet."""


class _Worker:
    """State of this worker process."""

    stop: c_byte | None = None
    is_busy = False


def choose_jobs(config: CompareConfig, device: str, threads: int) -> tuple[int, int]:
    """(runs at a time, CPU threads of each). `threads` is what the configuration fixes, 0 for nothing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if resolve_device(device) != "cpu":
        return config.jobs or 1, threads
    jobs = config.jobs or max(1, cores // max(1, threads))
    return jobs, threads or max(1, cores // jobs)


def resolve_device(device: str) -> str:
    """The device type that `auto` stands for on this machine."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def decide_precision(config: TrainConfig) -> dict[str, str]:
    """What "auto" precision stands for in all runs: decided once, so that no arm computes in another one."""
    import torch

    from muonlm.dist.precision import bfloat16_is_fast

    is_fast = bfloat16_is_fast(torch.device(resolve_device(config.loop.device)))
    decided = "bfloat16" if is_fast else "float32"
    return {"loop.precision": decided, "optim.newton_schulz.dtype": decided}


def make_pool(jobs: int, stop: c_byte, log: Path) -> Executor:
    """`jobs` persistent workers; what they print goes to `log`."""
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(["muonlm.train.loop"])
    log.parent.mkdir(parents=True, exist_ok=True)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(stop, str(log)))


def new_stop() -> c_byte:
    """Shared memory whose `value` is what is asked of all workers of a pool, one of `Stop`."""
    return RawValue(c_byte, Stop.GO_ON)


def _start(stop: c_byte, log: str) -> None:
    if hasattr(os, "setsid"):
        with suppress(OSError):
            os.setsid()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_idle_signal)
    _Worker.stop = stop
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()


def _on_idle_signal(signum: int, frame: object) -> None:
    if _Worker.is_busy:
        raise _Stopped
    os._exit(1)


def _is_orphan() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _watch(stop: c_byte) -> None:
    while stop.value == Stop.GO_ON and not _is_orphan():
        time.sleep(0.25)
    if _Worker.is_busy:
        os.kill(os.getpid(), signal.SIGTERM)
    while stop.value != Stop.LEAVE and not _is_orphan():
        time.sleep(0.25)
    while _Worker.is_busy:
        time.sleep(0.1)
    os._exit(1)


def run_trial(train_config: TrainConfig) -> Outcome:
    """Train one run in this process, to its end or to a stop signal. What goes wrong stands in the outcome."""
    try:
        # Busy before the look at `stop`: either this sees what is asked, or `_watch` sees that there is one to signal.
        _Worker.is_busy = True
        if _is_orphan() or (_Worker.stop is not None and _Worker.stop.value != Stop.GO_ON):
            return Outcome("preempted")
        return _train(train_config)
    except _Stopped:
        return Outcome("preempted")
    finally:
        _Worker.is_busy = False


def _train(train_config: TrainConfig) -> Outcome:
    try:
        from muonlm.optim.gradients import NonFiniteGradient
        from muonlm.train.loop import train
    except ImportError:
        return Outcome("error", error=traceback.format_exc())
    try:
        status = train(train_config)
    except NonFiniteGradient as error:
        return Outcome("failed", error=str(error))
    except UserError as error:
        return Outcome("error", error=str(error), is_user_error=True)
    except Exception:
        return Outcome("error", error=traceback.format_exc())
    loss: Any = status.final_loss
    if status.state == "finished" and (loss is None or not math.isfinite(loss)):
        return Outcome("failed", None, status.seconds, status.tokens, f"the final loss is {loss}")
    return Outcome(status.state, loss, status.seconds, status.tokens)
