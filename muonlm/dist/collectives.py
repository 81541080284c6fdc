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
from datetime import timedelta
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist


class Count(TypedDict):
    """Totals of one kind of collective on this rank since the last reset."""

    calls: int
    bytes: int
    seconds: float


Op = Literal["sum", "max", "min", "avg"]
Group = dist.ProcessGroup | None
_COUNTS: dict[str, Count] = defaultdict(lambda: Count(calls=0, bytes=0, seconds=0.0))
# Newer releases of torch rename it and warn of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_timeout: timedelta | None = None
_TEAMS: dict[tuple[int, ...], Group] = {}
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


def all_reduce(tensor: torch.Tensor, op: Op = "sum", group: Group = None, *, kind: str = "all_reduce") -> torch.Tensor:
    """Reduce `tensor` over the ranks in place and return it. One all_reduce of its bytes, counted under `kind`."""
    if is_active():
        with _counted(kind, tensor):
            dist.all_reduce(tensor, op=_OPS[op], group=group)
    return tensor


def all_to_all(
    output: torch.Tensor,
    input: torch.Tensor,
    output_sizes: list[int] | None = None,
    input_sizes: list[int] | None = None,
    *,
    group: Group,
    kind: str = "all_to_all",
) -> torch.Tensor:
    """Send consecutive rows of `input`, `input_sizes` of them, to the ranks of `group` in order, and return `output`.

    `output` receives `output_sizes` rows from the ranks in order; without sizes, both are cut evenly. One all_to_all,
    counted under `kind` with the bytes for other ranks.
    """
    with _counted(kind, None):
        dist.all_to_all_single(output, input, output_sizes, input_sizes, group=group)
    row_bytes = input[:1].nbytes
    size, own = dist.get_world_size(group), dist.get_rank(group)
    kept = input.size(0) // size if input_sizes is None else input_sizes[own]
    _COUNTS[kind]["bytes"] += (input.size(0) - kept) * row_bytes
    return output


def broadcast(tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
    """Overwrite `tensor` with that of rank `src` and return it."""
    if is_active():
        with _counted("broadcast", tensor):
            dist.broadcast(tensor, src=src)
    return tensor


def forget_teams() -> None:
    """Forget the groups that `team_group` has made: they end with the group of all ranks."""
    _TEAMS.clear()


def set_timeout(timeout: timedelta) -> None:
    """How long collectives of groups made from now on may wait."""
    global _timeout
    _timeout = timeout


class Pending:
    """A collective under way; `wait` returns when its output may be read. The time spent in waiting is counted."""

    def __init__(self, name: str, work: Any, *buffers: torch.Tensor) -> None:
        self._name, self._work, self._buffers = name, work, buffers

    def wait(self) -> None:
        """Wait for the output; buffers that were sent may be written again. Later calls return at once."""
        if self._work is not None:
            begin = time.perf_counter()
            self._work.wait()
            _COUNTS[self._name]["seconds"] += time.perf_counter() - begin
            self._work, self._buffers = None, ()


def start_all_to_all(
    output: torch.Tensor, input: torch.Tensor, output_sizes: list[int], input_sizes: list[int]
) -> Pending:
    """Send consecutive parts of flat `input`, of `input_sizes` elements, to the ranks in order.

    `output` receives the parts of `output_sizes` elements from the ranks in order. Counts the bytes for other ranks.
    """
    with _counted("all_to_all", None):
        work = dist.all_to_all_single(output, input, output_sizes, input_sizes, async_op=True)
    _COUNTS["all_to_all"]["bytes"] += (sum(input_sizes) - input_sizes[rank()]) * input.element_size()
    return Pending("all_to_all", work, output, input)


def start_all_gather(output: torch.Tensor, input: torch.Tensor) -> Pending:
    """Concatenate every rank's `input` (same shape on all) into `output` (world_size times as long)."""
    if not is_active():
        output.copy_(input)
        return Pending("all_gather", None)
    with _counted("all_gather", input):
        work = _all_gather(output, input, async_op=True)
    return Pending("all_gather", work, output, input)


def start_reduce_scatter(output: torch.Tensor, input: torch.Tensor, op: Op = "sum") -> Pending:
    """Reduce `input` over the ranks and give each an equal part of it, in rank order. Counts the bytes of `input`."""
    if not is_active():
        output.copy_(input)
        return Pending("reduce_scatter", None)
    with _counted("reduce_scatter", input):
        work = _reduce_scatter(output, input, op=_OPS[op], async_op=True)
    return Pending("reduce_scatter", work, output, input)


def team_group(ranks: tuple[int, ...]) -> Group:
    """The process group of `ranks`, made when it is first asked for: by all processes, in the same order."""
    if ranks not in _TEAMS:
        # torch gives new groups its own timeout, of up to half an hour, rather than that of the group of all ranks.
        _TEAMS[ranks] = dist.new_group(list(ranks), timeout=_timeout)
    return _TEAMS[ranks]


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
