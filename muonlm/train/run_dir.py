"""The run directory: the only state of a run, and who may write it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import ValidationError

from muonlm.config.errors import UserError
from muonlm.config.load import dump_toml
from muonlm.config.schema import TrainConfig
from muonlm.dist.agree import on_main, raised_on_all_ranks
from muonlm.dist.process import World
from muonlm.track.disk import disk_errors
from muonlm.train.disk import LogFile, write_atomically

STATUS_SCHEMA = 1
# What a run may go on with although it began with another value: nothing here changes the numbers it computes, but
# for rounding where threads, ranks or micro-batches change the order of a sum.
MAY_DIFFER = (
    "track.", "checkpoint.", "dist.", "loop.threads", "loop.micro_batch_size", "loop.compile",
    "loop.activation_checkpointing", "loop.check_memory", "data.verify", "data.prepare", "run_dir"
)  # fmt: skip
# config.toml goes last: what is left of an interrupted removal still says whose it is.
_OF_A_RUN = (
    "status.json", "checkpoints", "metrics.jsonl", "environment.json", "rules.txt", "wandb_id", "report.html",
    "tensorboard", "figures", "config.toml",
)  # fmt: skip
_log = logging.getLogger("muonlm")


@dataclass
class Progress:
    """Where a run stands: this and the tensors are its whole state.

    `sequences` is the data cursor, training sequences consumed by all ranks together; `seconds` is training time over
    all attempts, without evaluation and saving.
    """

    step: int = 0
    sequences: int = 0
    seconds: float = 0.0
    final_loss: float | None = None


@dataclass(frozen=True)
class RunStatus:
    """How a call of `train` ended. `seconds` is training time over all attempts, without evaluation and saving."""

    state: Literal["finished", "preempted"]
    step: int
    tokens: int
    final_loss: float | None
    seconds: float


class RunDirectory:
    """Context manager that claims the run directory for this run; all ranks enter it together.

    Raises UserError when the directory cannot be written, another process trains in it, or it belongs to another
    configuration. `fresh` removes what an earlier run left there (its logs stay). An error that leaves the block
    after `begin` is recorded in status.json.
    """

    def __init__(self, config: TrainConfig, world: World, *, fresh: bool = False) -> None:
        self.path = Path(config.resolved_run_dir)
        self.finished: RunStatus | None = None
        self.recorded: dict[str, Any] = {}
        self.attempt = 0
        self._config = config
        self._world = world
        self._fresh = fresh
        self._lock: int | None = None
        self._status: dict[str, Any] | None = None
        self._handlers: list[logging.Handler] = []

    def __enter__(self) -> Self:
        try:
            self.attempt, self.recorded, self.finished = on_main(self._claim)
            if self.finished is None:
                with raised_on_all_ranks(), disk_errors(self.path):
                    self._open_log()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            _log.error("stopped by %s: %s", type(error).__name__, error)
            if self._status is not None and self._world.is_main:
                with suppress(UserError):  # the error that ended the run must not be hidden by a full disk
                    self._write_status({**self._status, "state": "failed", "error": f"{type(error).__name__}: {error}"})
        self._release()

    def begin(self, environment: dict[str, Any], rules: str) -> None:
        """Write config.toml, environment.json and rules.txt: from now on the directory belongs to this run."""
        with raised_on_all_ranks():
            if self._world.is_main:
                write_atomically(self.path / "config.toml", dump_toml(self._config))
                write_atomically(self.path / "environment.json", json.dumps(environment, indent=1) + "\n")
                write_atomically(self.path / "rules.txt", rules + "\n")

    def update(self, state: Literal["running", "finished", "preempted"], progress: Progress) -> None:
        """Rewrite status.json (on the main rank)."""
        self._status = {
            "schema": STATUS_SCHEMA,
            "state": state,
            "step": progress.step,
            "num_steps": self._config.num_steps,
            "tokens": progress.step * self._config.batch_tokens,
            "attempt": self.attempt,
            "final_loss": progress.final_loss,
            "error": None,
            "seconds": progress.seconds,
        }
        if self._world.is_main:
            self._write_status(self._status)

    def end(self, state: Literal["finished", "preempted"], progress: Progress) -> RunStatus:
        """Rewrite status.json for the last time and return the outcome, the same on every rank."""
        self.update(state, progress)
        tokens = progress.step * self._config.batch_tokens
        return RunStatus(state, progress.step, tokens, progress.final_loss, progress.seconds)

    def _claim(self) -> tuple[int, dict[str, Any], RunStatus | None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(self.path)
            if self._fresh:
                _check_is_run(self.path)
                _remove_run(self.path)
            (self.path / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run directory {self.path} cannot be written: {error.strerror}; set run_dir to another place"
            ) from error
        _check_same_config(self.path, self._config)
        status, recorded = (_read_json(self.path / name) for name in ("status.json", "environment.json"))
        fields = RunStatus.__dataclass_fields__
        if status.get("state") == "finished" and _are_numbers(status, fields.keys() - {"state"}):
            return 0, recorded, RunStatus(**{key: status[key] for key in fields})
        attempts = (int(p.name.removeprefix("attempt_")) for p in (self.path / "logs").glob("attempt_*"))
        return max(attempts, default=0) + 1, recorded, None

    def _open_log(self) -> None:
        folder = self.path / "logs" / f"attempt_{self.attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        to_file = LogFile(folder / f"rank_{self._world.rank}.log", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._handlers = [to_file]
        if self._world.is_main:
            to_user = logging.StreamHandler(sys.stderr)
            to_user.setLevel(logging.WARNING)
            to_user.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
            # An error is raised and printed by whoever called; here it would be told twice.
            to_user.addFilter(lambda record: record.levelno < logging.ERROR)
            self._handlers.append(to_user)
        for handler in self._handlers:
            _log.addHandler(handler)
        _log.setLevel(logging.INFO)

    def _release(self) -> None:
        for handler in self._handlers:
            _log.removeHandler(handler)
            with suppress(OSError):  # what could not be flushed to a full disk was told already
                handler.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write_status(self, status: Mapping[str, Any]) -> None:
        write_atomically(self.path / "status.json", json.dumps(status, indent=1) + "\n")


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys that differ between two configurations and may not, each as `key: old -> new`."""
    old_flat, new_flat = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key}: {old_flat.get(key)!r} -> {new_flat.get(key)!r}"
        for key in sorted(old_flat.keys() | new_flat.keys())
        if old_flat.get(key) != new_flat.get(key) and not key.startswith(MAY_DIFFER)
    ]


def check_same_data(recorded: Mapping[str, Any], found: Mapping[str, Any], message: str) -> None:
    """Raise UserError where two environments have other data; what the older one does not say is not compared."""
    keys = ("tokenizer_fingerprint", "train_fingerprint", "validation_fingerprint")
    if any(recorded.get(key) not in (None, found[key]) for key in keys):
        raise UserError(message)


def _check_same_config(path: Path, config: TrainConfig) -> None:
    file = path / "config.toml"
    if not file.exists():
        # An empty metrics.jsonl is of a start that came no further.
        state = [name for name in ("checkpoints", "metrics.jsonl", "status.json") if _has_content(path / name)]
        if state:
            raise UserError(
                f"run directory {path} holds {', '.join(state)} but no config.toml: whose they are cannot be told. "
                "Set another name or run_dir, or remove them"
            )
        return
    try:
        old = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no TOML: {error}; restore it, or set another name or run_dir") from error
    with suppress(ValidationError):  # one of another version is compared as it stands
        old = TrainConfig.model_validate(old).model_dump()
    if differing := config_differences(old, config.model_dump()):
        lines = "\n  ".join(differing)
        raise UserError(
            f"run directory {path} belongs to a run of another configuration:\n  {lines}\n"
            f"Give this run another name or run_dir (branch_from={path} goes on from there), set these keys back to go "
            "on with the old run, or discard the old run with --fresh"
        )


def _has_content(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.stat().st_size > 0)


def _check_is_run(path: Path) -> None:
    """Refuse to discard what no run of ours wrote: the directory may be any that somebody named."""
    present = [name for name in _OF_A_RUN if (path / name).exists()]
    if not present:
        return
    try:
        table = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        table = {}
    # Not by the schema: a run of another version may be discarded too.
    if not all(isinstance(table.get(key), kind) for key, kind in (("name", str), ("data", dict), ("loop", dict))):
        raise UserError(
            f"--fresh would remove {', '.join(present)} from {path}, which has no config.toml of a run: "
            "remove them by hand if they are of no use, or set another name or run_dir"
        )


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def _remove_run(path: Path) -> None:
    for name in _OF_A_RUN:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the run; empty where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _are_numbers(table: Mapping[str, Any], keys: Iterable[str]) -> bool:
    return all(isinstance(table.get(key), int | float) for key in keys)


def lock_directory(path: Path) -> int | None:
    """Lock the directory for this process; the system lets go of the lock when the process ends, however it ends."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(
                f"another process trains in {path}; wait for it, or give this run another name or run_dir"
            ) from error
        _log.warning("%s does not support locks (%s); make sure that only one run writes there", path, error.strerror)
        return None
    return descriptor
