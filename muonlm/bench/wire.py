"""Counts the collectives that a piece of code issues, whoever wrote it, and the bytes that they send."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from muonlm.dist.collectives import Count


class _Op(NamedTuple):
    kind: str
    inputs: int  # which argument holds the tensors that are sent
    wire: Callable[[int, int], float]  # bytes that a rank sends on a ring for (bytes of input, number of ranks)


def _all_gather(size: int, ranks: int) -> float:
    return size * (ranks - 1)


def _all_reduce(size: int, ranks: int) -> float:
    return size * 2 * (ranks - 1) / ranks


def _part(size: int, ranks: int) -> float:
    return size * (ranks - 1) / ranks


def _whole(size: int, ranks: int) -> float:
    return size


_OPS = {
    "c10d.allreduce_": _Op("all_reduce", 0, _all_reduce),
    "c10d.allreduce_coalesced_": _Op("all_reduce", 0, _all_reduce),
    "c10d.allgather_": _Op("all_gather", 1, _all_gather),
    "c10d._allgather_base_": _Op("all_gather", 1, _all_gather),
    "c10d.allgather_into_tensor_coalesced_": _Op("all_gather", 1, _all_gather),
    "c10d.reduce_scatter_": _Op("reduce_scatter", 1, _part),
    "c10d._reduce_scatter_base_": _Op("reduce_scatter", 1, _part),
    "c10d.alltoall_": _Op("all_to_all", 1, _part),
    "c10d.alltoall_base_": _Op("all_to_all", 1, _part),
    "c10d.broadcast_": _Op("broadcast", 0, _whole),
    "_c10d_functional.all_reduce": _Op("all_reduce", 0, _all_reduce),
    "_c10d_functional.all_reduce_": _Op("all_reduce", 0, _all_reduce),
    "_c10d_functional.all_gather_into_tensor": _Op("all_gather", 0, _all_gather),
    "_c10d_functional.reduce_scatter_tensor": _Op("reduce_scatter", 0, _part),
    "_c10d_functional.all_to_all_single": _Op("all_to_all", 0, _part),
    "_c10d_functional.broadcast": _Op("broadcast", 0, _whole),
    "_dtensor.shard_dim_alltoall": _Op("all_to_all", 0, _part),
}


class WireCounter(TorchDispatchMode):
    """Context manager that counts the collectives of this thread by kind: calls, and bytes sent to other ranks.

    Sees what reaches torch's process groups, through torch.distributed or DTensor. A ring's bytes are counted for
    all_gather, all_reduce and reduce_scatter; what an all_to_all with given sizes leaves on this rank is not counted.
    Adds some microseconds to every operation, so what it counts should not be timed. Seconds stay 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Count] = defaultdict(lambda: Count(calls=0, bytes=0, seconds=0.0))

    @property
    def calls(self) -> int:
        """Number of collectives."""
        return sum(count["calls"] for count in self.counts.values())

    @property
    def bytes(self) -> int:
        """Bytes sent."""
        return sum(count["bytes"] for count in self.counts.values())

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count `func` if it is a collective, and call it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the tensors inside, and with its collectives
        op = _OPS.get(str(func._overloadpacket))
        if op is not None:
            count = self.counts[op.kind]
            count["calls"] += 1
            count["bytes"] += round(_sent(op, args))
        return func(*args, **(kwargs or {}))


def _sent(op: _Op, args: Sequence[Any]) -> float:
    group = _group(args)
    ranks, here = group.size(), group.rank()
    value = args[op.inputs]
    if op.kind == "all_to_all":
        if isinstance(value, list):  # one tensor for each rank
            return _bytes(value) - _bytes(value[here])
        sizes = next((a for a in reversed(args) if isinstance(a, (list, tuple)) and len(a) == ranks), None)
        if sizes is not None and sum(sizes) == value.shape[0]:
            return _bytes(value) * (1 - sizes[here] / sum(sizes)) if sum(sizes) else 0.0
    return op.wire(_bytes(value), ranks)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value))


def _group(args: Sequence[Any]) -> dist.ProcessGroup:
    for value in reversed(args):
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value)
            except (RuntimeError, TypeError):
                continue  # the reduction
        if isinstance(value, str) and value not in _REDUCTIONS:
            return _resolve_process_group(GroupName(value))
    raise ValueError("a collective without a process group")


_REDUCTIONS = {"sum", "avg", "max", "min", "product", "band", "bor", "bxor"}
