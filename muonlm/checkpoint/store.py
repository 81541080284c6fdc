"""Save and restore a run through torch.distributed.checkpoint.

A checkpoint is a directory `checkpoints/step_00000512` that holds tensors only: the model under its parameter names,
the optimizer's state under `optimizer.<parameter>.<key>`, and torch's random state; all as logical full tensors, so
that any number of ranks can load them. Learning rates and other settings are not in it: they follow from the
configuration and the step. The directory is written under another name, `complete.json` (what the caller wants to
keep, size and CRC-32 of every file, CRC-32 of all that) goes in last, and a rename makes it visible; a directory
whose files are not so is not a checkpoint.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.dist.agree import on_main
from muonlm.dist.dcp import UNREADABLE, quiet_checkpoints
from muonlm.optim.muon import Muon
from muonlm.optim.state import named_state

FOLDER = "checkpoints"
MARKER = "complete.json"
SCHEMA_VERSION = 1
_TEMPORARY = ".unfinished_"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
_log = logging.getLogger(__name__)


class Contents(Protocol):
    """Model and optimizer as a checkpoint holds them. `device` is where the model computes."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    def named(self) -> dict[str, Any]:
        """{"model": {name: tensor}, "optimizer": {parameter: {key: tensor}}}: what is saved, and loaded in place."""

    def loaded(self, tensors: dict[str, Any]) -> None:
        """Called when those tensors have been loaded."""


class ModelAndOptimizer:
    """`Contents` of a model that may be wrapped in DistributedDataParallel, or sharded by FSDP2 and tensor parallelism.

    Names are those of the model without any wrapper.
    """

    def __init__(self, model: nn.Module, optimizer: Muon) -> None:
        self._model, self._optimizer = model, optimizer

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return next(self._model.parameters()).device

    def named(self) -> dict[str, Any]:
        """The tensors themselves."""
        return {"model": get_model_state_dict(self._model), "optimizer": named_state(self._optimizer)}

    def loaded(self, tensors: dict[str, Any]) -> None:
        """Tell an engine that keeps copies of parameters."""
        set_model_state_dict(self._model, tensors["model"])


def save(run_dir: str | Path, step: int, contents: Contents, extra: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep`; called by all ranks.

    `extra` must be JSON. Each rank writes what it has, and of what several have one does. Collectives: those of
    dcp.save (plans of a few kB) and three small ones. Raises UserError when the disk is full or fails; what is there
    stays as it was.
    """
    folder = Path(run_dir) / FOLDER
    target = folder / step_name(step)
    temporary = folder / (_TEMPORARY + target.name)
    state = _state(contents)
    with _disk_errors(step, folder):
        on_main(lambda: _make_room(folder, temporary, state))
        with quiet_checkpoints():
            dcp.save(state, checkpoint_id=temporary, no_dist=not collectives.is_active())
        on_main(lambda: _publish(temporary, target, step, extra))
    on_main(lambda: _retain(folder, keep))
    return target


def latest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Warns of newer ones that are incomplete and ignores them."""
    for path in reversed(_step_dirs(Path(run_dir) / FOLDER)):
        problem = defect(path, is_read=True)
        if problem is None:
            return path
        _log.warning("checkpoint %s is incomplete or damaged (%s) and ignored", path, problem)
    return None


_START_OVER = "Delete that directory to go on from the one before it, or start over with --fresh"


def load(
    path: str | Path, contents: Contents, *, with_optimizer: bool = True, advice: str = _START_OVER
) -> dict[str, Any]:
    """Restore model, optimizer (unless it is to stay) and random state in place, bit for bit; returns `save`'s `extra`.

    Called by all ranks, of which there may be another number than when it was saved, sharding in another way; each
    reads its parts. Raises UserError, with `advice`, when the checkpoint does not fit the model or cannot be read.
    """
    path = Path(path)
    state = _state(contents)
    try:
        with quiet_checkpoints():
            stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            # A run may go on with another number of GPUs, or none.
            state["random"] = {name: value for name, value in state["random"].items() if f"random.{name}" in stored}
            wanted = state if with_optimizer else {key: part for key, part in state.items() if key != "optimizer"}
            dcp.load(wanted, checkpoint_id=path, no_dist=not collectives.is_active())
        extra: dict[str, Any] = json.loads((path / MARKER).read_text())["extra"]
    except UNREADABLE as error:
        raise UserError(f"checkpoint {path} cannot be loaded: {_reason(error)}. {advice}") from error
    contents.loaded(state)
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"])
    return extra


def step_name(step: int) -> str:
    """Name of the directory of a step's checkpoint."""
    return f"step_{step:08d}"


def _state(contents: Contents) -> dict[str, Any]:
    """What is saved; also the template that is loaded into."""
    random = {"cpu": torch.get_rng_state()}
    if contents.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    return {**contents.named(), "random": random}


def _make_room(folder: Path, temporary: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(_TEMPORARY + "*"):
        shutil.rmtree(left_over)
    temporary.mkdir()
    with quiet_checkpoints():
        needed = sum(t.size().numel() * t.dtype.itemsize for t in _tensors(state))  # logical tensors: all ranks' parts
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + 2**20:
        raise OSError(errno.ENOSPC, f"the checkpoint needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free")


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)


def _publish(temporary: Path, target: Path, step: int, extra: dict[str, Any]) -> None:
    files = {file.name: [file.stat().st_size, _checksum(file)] for file in sorted(temporary.iterdir())}
    marker = {"schema": SCHEMA_VERSION, "step": step, "files": files, "extra": extra}
    with open(temporary / MARKER, "w", encoding="utf-8") as out:
        json.dump({**marker, "crc32": _marker_checksum(marker)}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    _sync_directory(temporary)
    _remove(target)  # only an incomplete one can be here: a complete one would have been resumed from
    os.rename(temporary, target)
    _sync_directory(target.parent)


def _retain(folder: Path, keep: int) -> None:
    complete = [path for path in _step_dirs(folder) if defect(path) is None]
    for path in set(_step_dirs(folder)) - set(complete[-keep:]):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves none that looks whole."""
    if path.exists():
        doomed = path.with_name(_TEMPORARY + "removed_" + path.name)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _step_dirs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def _checksum(file: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


def _marker_checksum(marker: dict[str, Any]) -> int:
    """CRC-32 of what complete.json says, but for the checksum itself."""
    return zlib.crc32(json.dumps(marker, sort_keys=True).encode())


def defect(path: Path, *, is_read: bool = False) -> str | None:
    """Why this directory is no checkpoint, or None; `is_read` compares the content of its files too."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        if marker.pop("crc32") != _marker_checksum(marker):
            return f"{MARKER} is damaged: its checksum is another"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"no readable {MARKER}"
    for name, (size, checksum) in marker["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
        if is_read and _checksum(file) != checksum:
            return f"{name} is damaged: its checksum is another"
    return None


@contextmanager
def _disk_errors(step: int, folder: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises, on any rank, into one message."""
    try:
        yield
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if isinstance(error, UserError) or not _is_disk_error(error):
            raise
        before = latest(folder.parent)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder}: {_reason(error)}. "
            f"Free space there and repeat the command; it goes on from {before.name if before else 'the start'}"
        ) from error


def _is_disk_error(error: BaseException) -> bool:
    if isinstance(error, dcp.api.CheckpointException):
        return any(_is_disk_error(failure) for failure, _ in error.failures.values())
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRORS
    # torch's C++ writer reports a short write so; other ranks see the text of rank 0's OSError.
    text = str(error)
    return "PytorchStreamWriter" in text or "file write failed" in text or "[Errno " in text


def _reason(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {failure}"
    return str(error)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
