"""Write a model as sharded safetensors files, tensor by tensor: in memory lie one shard and one stack of experts."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from muonlm.bridge.tensors import ModelTensor, Shape
from muonlm.config.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
# The files of an export that a new one may replace, besides those that it writes itself.
_WEIGHTS = "model*.safetensors*"
_HEADER_BYTES = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Shard:
    """One file: the disk names in it, and their bytes together."""

    names: list[str] = field(default_factory=list)
    num_bytes: int = 0


def check_shapes(found: Mapping[str, Shape], tensors: Iterable[ModelTensor], origin: Path) -> None:
    """Raise UserError unless `found`, the shapes of a checkpoint, are those of `tensors`.

    A tied head may be among them: it is the embedding once more.
    """
    wanted = {tensor.name: tensor.shape for tensor in tensors if tensor.is_stored}
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not known" for name in found.keys() - wanted.keys() - {"lm_head.weight"}]
    problems += [
        f"{name} has shape {list(found[name])}, config.toml gives {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:8])
        raise UserError(
            f"{origin} does not hold the model of the run's config.toml ({len(problems)} differences):\n  {shown}\n"
            "Export it with the version of muonlm that trained it (environment.json)"
        )


def plan_shards(tensors: Iterable[ModelTensor], itemsize: int, shard_bytes: int) -> list[Shard]:
    """Which tensors lie in which file: in order, each file as full as it gets; one that is larger has its own."""
    shards = [Shard()]
    for tensor in tensors:
        num_bytes = tensor.disk_numel * (4 if tensor.is_float32 else itemsize)
        for name in tensor.disk_names:
            if shards[-1].names and shards[-1].num_bytes + num_bytes > shard_bytes:
                shards.append(Shard())
            shards[-1].names.append(name)
            shards[-1].num_bytes += num_bytes
    return shards


def write_model(
    target: Path,
    tensors: list[ModelTensor],
    read: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype,
    shard_bytes: int,
) -> list[Shard]:
    """Write `tensors`, each asked of `read` by its name here, into `target`; with an index where there are several
    files. Returns what lies where."""
    shards = plan_shards(tensors, dtype.itemsize, shard_bytes)
    files = [_file_name(number, len(shards)) for number in range(len(shards))]
    pending: dict[str, torch.Tensor] = {}
    number = 0
    for name, part in _parts(tensors, read, dtype):
        pending[name] = part
        if len(pending) == len(shards[number].names):
            path = target / files[number]
            save_file(pending, path, metadata={"format": "pt"})
            path.chmod(target.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
            pending, number = {}, number + 1
    assert not pending
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard.names}
        total = {"total_size": sum(shard.num_bytes for shard in shards)}
        index = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2)
        (target / INDEX_NAME).write_text(index + "\n", encoding="utf-8")
    return shards


def _parts(
    tensors: list[ModelTensor], read: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Disk names and tensors in order. A part of a stack is a copy, so that the stack is freed after its last one."""
    for tensor in tensors:
        wanted = torch.float32 if tensor.is_float32 else dtype
        if not tensor.is_stored:
            assert prod(tensor.shape) == 0
            yield tensor.name, torch.empty(tensor.shape, dtype=wanted)
        elif tensor.is_stack:
            stack = read(tensor.name)
            for expert, name in enumerate(tensor.disk_names):
                yield name, stack[expert].to(wanted, copy=True)
            del stack
        else:
            yield tensor.name, read(tensor.name).to(wanted)


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


@contextmanager
def replaced_directory(target: Path, needed_bytes: int, *, force: bool) -> Iterator[Path]:
    """A directory to write to, which becomes `target` when the block ends well, and is removed when it does not.

    With `force`, a `target` that holds a model is replaced. Raises UserError for any other that is not empty, and
    where the disk has less than `needed_bytes` or is full on the way.
    """
    _check_target(target, force=force)
    temporary = target.with_name(f".{target.name}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)  # of an export that was killed
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes + _HEADER_BYTES:
            raise UserError(
                f"the export to {target} needs {needed_bytes / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free; "
                "make room there, or take --dtype bfloat16 or another disk"
            )
        temporary.mkdir()
        yield temporary
        _publish(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) and not isinstance(error, UserError):
            raise UserError(_disk_message(error, target)) from error
        raise


def _check_target(target: Path, *, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a directory that does not exist yet")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise UserError(f"{target} is not empty; give another directory, or replace the model in it with --force")
    if not (target / "config.json").is_file() or not any(target.glob(_WEIGHTS)):
        raise UserError(f"{target} holds no exported model, so that --force would remove something else; give another")


def _publish(temporary: Path, target: Path) -> None:
    if target.is_dir():
        old = target.with_name(f".{target.name}.replaced")
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)


def _disk_message(error: OSError | SafetensorError, target: Path) -> str:
    is_full = getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "os error 28" in str(error)
    advice = "the disk is full; make room there" if is_full else "give a directory that can be written"
    return f"the export to {target} could not be written: {error}. Nothing of it is left; {advice}"
