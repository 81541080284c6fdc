"""Iterations recorded as CUDA graphs: for stacks so small that the host launches slower than the GPU computes.

A launch from Python takes some 50 microseconds, most of it Triton's handling of arguments and descriptors, and an
iteration has fifteen. On an H100, one 2048 x 2048 matrix took 0.79 ms so, and 0.43 ms as a graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# FLOPs of one product up to which an iteration is recorded: about 30 microseconds of an H100.
MOST_FLOPS = 2**34
# Each holds its buffers: two of the size of the stack, and two or five of its Gram matrices.
_MOST_GRAPHS = 16

_graphs: OrderedDict[tuple[Any, ...], Recording] = OrderedDict()
_seen: set[tuple[Any, ...]] = set()


class Buffers(NamedTuple):
    """X before each segment and after the last, and what rounding took from it, where that is carried."""

    chain: list[torch.Tensor]
    lo_KMN: torch.Tensor | None


class Recording(NamedTuple):
    """A recorded iteration: fill `chain[0]` and `lo_KMN`, replay, and read `chain[-1]` before the next replay."""

    graph: torch.cuda.CUDAGraph
    buffers: Buffers


def is_worthwhile(size: tuple[int, int, int], device: torch.device) -> bool:
    """Whether a stack (K, M, N), M <= N, is small enough, on a device that records, outside another recording."""
    batch, rows, cols = size
    is_small = 2 * batch * rows * rows * cols <= MOST_FLOPS
    return is_small and device.type == "cuda" and not torch.version.hip and not torch.cuda.is_current_stream_capturing()


def recording(
    key: tuple[Any, ...], allocate: Callable[[], Buffers], iterate: Callable[[Buffers], None]
) -> Recording | None:
    """The recording of `iterate` under `key`, made at the second call with it on this stream: the first compiles.

    `key` says everything that the launches depend on. None at the first call.
    """
    key = (*key, torch.cuda.current_stream().cuda_stream)
    if key in _graphs:
        _graphs.move_to_end(key)
        return _graphs[key]
    if key not in _seen:
        _seen.add(key)
        return None
    buffers = allocate()
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog, may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        iterate(buffers)
    _graphs[key] = Recording(graph, buffers)
    if len(_graphs) > _MOST_GRAPHS:
        torch.cuda.synchronize()  # the oldest may still be running
        _graphs.popitem(last=False)
    return _graphs[key]
