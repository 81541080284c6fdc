"""Every collective of this project goes through here, where its calls, bytes and seconds are counted.

All functions are the identity when no process group is initialised. Counted bytes are the bytes of this rank's
input tensor; what travels on the wire follows from the algorithm (ring all-reduce: 2 (D - 1) / D of it).
Collectives that DistributedDataParallel issues in the backward pass are its own and not counted.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist


class Count(TypedDict):
    """Totals of one kind of collective on this rank since the last reset."""

    calls: int
    bytes: int
    seconds: float


_COUNTS: dict[str, Count] = defaultdict(lambda: Count(calls=0, bytes=0, seconds=0.0))
# Newer releases of torch rename it and warn of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "avg": dist.ReduceOp.AVG}


def is_active() -> bool:
    """True when more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if is_active() else 1


def all_reduce(tensor: torch.Tensor, op: Literal["sum", "max", "min", "avg"] = "sum") -> torch.Tensor:
    """Reduce `tensor` over all ranks in place and return it. One all_reduce of its bytes."""
    if is_active():
        with _counted("all_reduce", tensor):
            dist.all_reduce(tensor, op=_OPS[op])
    return tensor


def all_gather_into(output: torch.Tensor, input: torch.Tensor) -> None:
    """Concatenate every rank's `input` (same shape on all) into `output` (world_size times as long)."""
    if is_active():
        with _counted("all_gather", input):
            _all_gather(output, input)
    else:
        output.copy_(input)


def barrier() -> None:
    """Wait for all ranks."""
    if is_active():
        with _counted("barrier", None):
            dist.barrier()


def any_rank(flag: bool) -> bool:
    """True on every rank when `flag` is true on at least one. One all_reduce of one integer."""
    if not is_active():
        return flag
    return bool(all_reduce(torch.tensor([int(flag)], device=_control_device()), "max").item())


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """The object of rank `src`, on every rank (pickled)."""
    if not is_active():
        return obj
    box = [obj]
    with _counted("broadcast_object", None):
        dist.broadcast_object_list(box, src=src, device=_control_device())
    return box[0]


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object in rank order, on every rank (pickled)."""
    if not is_active():
        return [obj]
    out: list[Any] = [None] * world_size()
    with _counted("gather_objects", None):
        dist.all_gather_object(out, obj)
    return out


def counters() -> dict[str, Count]:
    """Calls, bytes and host seconds of each collective since the last reset."""
    return {name: Count(**count) for name, count in _COUNTS.items()}


def reset_counters() -> None:
    """Start counting anew."""
    _COUNTS.clear()


def _control_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def _counted(name: str, tensor: torch.Tensor | None) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        count = _COUNTS[name]
        count["calls"] += 1
        count["bytes"] += tensor.numel() * tensor.element_size() if tensor is not None else 0
        count["seconds"] += time.perf_counter() - begin
