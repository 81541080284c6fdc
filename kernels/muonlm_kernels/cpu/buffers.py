"""Memory for the iterates, kept between calls: fresh pages cost more than the products of a small matrix."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

_CACHE_LINE_BYTES = 64


@contextmanager
def outside_of_modes() -> Iterator[None]:
    """For tensors that are kept: made in inference mode or a FakeTensorMode, they could not be used outside of it."""
    with torch.inference_mode(False), _disable_current_modes():
        yield


@dataclass(frozen=True)
class Buffers:
    """Memory for one matrix; the views are made once, because making them costs as much as a small product.

    Fields:
        x, x_t, y, y_t: two (M, N) matrices and their transposes.
        squares: five (M, M) matrices, each with its diagonal.
        gaps: what is between the end of a row and the next cache line, of all seven; empty for sides without gaps.
    """

    x: torch.Tensor
    x_t: torch.Tensor
    y: torch.Tensor
    y_t: torch.Tensor
    squares: list[tuple[torch.Tensor, torch.Tensor]]
    gaps: list[torch.Tensor]

    def clear_gaps(self) -> None:
        """Write zeros between the rows: oneDNN's AMX products read them, times zero, and NaN would come through."""
        for gap in self.gaps:
            gap.zero_()


class _Workspace(threading.local):
    """One piece of memory that each thread keeps and lets grow, and the buffers cut from it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._buffers: dict[tuple[int, int, torch.dtype], Buffers] = {}

    def buffers(self, m: int, n: int, dtype: torch.dtype) -> Buffers:
        """Buffers of one shape; their content is whatever was left there."""
        if found := self._buffers.get((m, n, dtype)):
            return found
        with outside_of_modes():
            return self._buffers.setdefault((m, n, dtype), self._make(m, n, dtype))

    def _make(self, m: int, n: int, dtype: torch.dtype) -> Buffers:
        per_line = _CACHE_LINE_BYTES // dtype.itemsize
        shapes = [(side, per_line * (-(-side // per_line) | 1)) for side in (n, n, m, m, m, m, m)]
        need = m * sum(stride for _, stride in shapes) * dtype.itemsize
        if self._memory.numel() < need:
            self._memory = torch.empty(need, dtype=torch.uint8, device="cpu")
            self._buffers.clear()
        memory, begin, views, gaps = self._memory[:need].view(dtype), 0, [], []
        for side, stride in shapes:
            whole = memory[begin : begin + m * stride].view(m, stride)
            views.append(whole[:, :side])
            if side % per_line:
                gaps.append(whole[:, side : side + per_line - side % per_line])
            begin += m * stride
        x, y, *squares = views
        return Buffers(x, x.mT, y, y.mT, [(square, square.diagonal()) for square in squares], gaps)


workspace = _Workspace()
