"""What earlier invocations left in a comparison directory, and who may write there."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from muonlm.compare.workers import Outcome
from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.train.run_dir import config_differences, lock_directory


class ArmRecord(BaseModel):
    """An arm in compare.json: what another invocation must agree with."""

    name: str
    config: dict[str, Any]


class TrialRecord(BaseModel):
    """A trial in compare.json. `run_dir` is relative to the comparison's directory."""

    run_dir: str
    state: str
    error: str | None = None


class Record(BaseModel):
    """The part of compare.json that the next invocation goes on from."""

    arms: list[ArmRecord] = []
    trials: list[TrialRecord] = []
    decided: dict[str, str] = {}


class _Kept(Record):
    """A record as it is written: nothing of it may be missing."""

    arms: list[ArmRecord]
    trials: list[TrialRecord]
    decided: dict[str, str]


class _Status(BaseModel):
    state: str
    final_loss: float | None
    seconds: float
    tokens: int


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Claims the directory for this process. Raises UserError where another comparison runs in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(directory)
    except UserError:
        raise UserError(
            f"another process runs a comparison in {directory}; wait for it, or give this one another output_dir"
        ) from None
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}; set output_dir to another place") from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def read_record(directory: Path) -> Record:
    """The record of an earlier invocation; an empty one if there is none. Raises UserError for one that is damaged."""
    path = directory / "compare.json"
    try:
        return _Kept.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Record()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it readable or remove it") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"])
        raise UserError(
            f"{path} is not the record of a comparison: {place and place + ': '}{first['msg']}. Remove it and repeat "
            "the command: finished runs are kept, only those that diverged are run again"
        ) from None


def recall(directory: Path, config: TrainConfig, failed: str | None) -> Outcome | None:
    """What an earlier invocation made of the run with that configuration; None where it is still to be done.

    `failed` is the reason with which the run diverged then, None if it did not. Raises UserError where the directory
    holds a run of other settings: taking its result or going on with it would compare what is not alike.
    """
    try:
        text = (directory / "status.json").read_text(encoding="utf-8")
        status = _Status.model_validate_json(text)
    except (OSError, ValueError):
        status = None
    is_finished = status is not None and status.state == "finished" and status.final_loss is not None
    is_known = _check_same_settings(directory, config, is_done=is_finished or failed is not None)
    if failed is not None and is_known:  # one whose directory was removed is run again
        return Outcome("failed", error=failed)
    if status is None or not is_finished:
        return None
    if not is_known:
        raise UserError(
            f"{directory} holds a finished run without config.toml, so that its settings are unknown. "
            "Remove that directory to run it again"
        )
    return Outcome("finished", status.final_loss, status.seconds, status.tokens)


def _check_same_settings(directory: Path, config: TrainConfig, *, is_done: bool) -> bool:
    """False where there is no config.toml. The name matters only to a run that is to go on."""
    path = directory / "config.toml"
    try:
        old = tomllib.loads(path.read_text(encoding="utf-8"))
        old = TrainConfig.model_validate(old).model_dump()
    except FileNotFoundError:
        return False
    except ValidationError:
        pass  # one of another version is compared as it stands
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Remove {directory} to run it again") from error
    new = config.model_dump()
    if is_done:
        new["name"] = old.get("name")
    if differing := config_differences(old, new):
        lines = "\n  ".join(differing)
        raise UserError(
            f"{directory} holds a run with other settings:\n  {lines}\n"
            "Set these back, choose another name or output_dir, or remove that directory to run it again"
        )
    return True
