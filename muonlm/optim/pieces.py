"""The matrices that a parameter is made of: Muon orthogonalizes these one by one, not what happens to be stored as one.

A fused projection is several matrices in one tensor; so is an expert stack. Orthogonalized as a whole it would get
another update than its parts (K. Jordan, "Muon", 2024: query, key and value are better treated separately).
"""

from __future__ import annotations

from dataclasses import dataclass

from muonlm.config.errors import UserError
from muonlm.optim.layout import Box, Index


@dataclass(frozen=True)
class Split:
    """How one dim of a weight (out, in) is divided into matrices.

    The dim (0 is out, 1 is in) consists of `groups` equal parts, each divided into segments of `sizes`. Segment j of
    all groups together is one matrix, or with `separate_groups` a matrix for each group.

    blocked query, key, value:       Split(sizes=(H * C, K * C, K * C))
    interleaved by key head (GQA):   Split(sizes=(H // K * C, C, C), groups=K)
    gate and up:                     Split(sizes=(F, F))
    one matrix a head:               Split(sizes=(C,), groups=H, separate_groups=True); dim=1 for an output projection
    """

    sizes: tuple[int, ...]
    groups: int = 1
    separate_groups: bool = False
    dim: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or self.groups < 1 or self.dim not in (0, 1):
            raise ValueError(f"{self}: sizes and groups are positive, dim is 0 (out) or 1 (in)")

    def segments(self) -> list[list[tuple[int, int]]]:
        """For each matrix the ranges (begin, length) of the dim that make it up."""
        offsets = [sum(self.sizes[:j]) for j in range(len(self.sizes))]
        period = sum(self.sizes)
        columns = [
            [(group * period + offset, size) for group in range(self.groups)]
            for offset, size in zip(offsets, self.sizes, strict=True)
        ]
        return [[segment] for column in columns for segment in column] if self.separate_groups else columns


@dataclass(frozen=True)
class Part:
    """A block of a parameter that stands at (row, col) of a matrix."""

    box: Box
    row: int
    col: int


@dataclass(frozen=True)
class Piece:
    """One matrix (rows, cols) of the parameter at `param` of a list, and the blocks that it consists of."""

    param: int
    label: str
    rows: int
    cols: int
    parts: tuple[Part, ...]

    @property
    def bounds(self) -> Box:
        """The smallest block of the parameter around this matrix."""
        start = tuple(min(part.box.start[d] for part in self.parts) for d in range(3))
        stop = [max(part.box.start[d] + part.box.shape[d] for part in self.parts) for d in range(3)]
        return Box(start, tuple(b - a for a, b in zip(start, stop)))  # type: ignore[arg-type]


def pieces_of(param: int, name: str, shape: Index, split: Split | None) -> list[Piece]:
    """The matrices of a parameter seen as a stack (E, out, in), in the order of the stack, then of the split.

    Raises UserError when the split does not divide the weight.
    """
    experts, rows, cols = shape
    if split is None:
        segments = [[(0, rows)]]
        dim = 0
    else:
        segments, dim = split.segments(), split.dim
        total = sum(split.sizes) * split.groups
        if total != shape[1 + dim]:
            raise UserError(
                f"{name}: a split of {split.groups} x {split.sizes} covers {total} of the {shape[1 + dim]} "
                f"{('rows', 'columns')[dim]} of the weight {shape[1:]}"
            )
    pieces = []
    for expert in range(experts):
        for number, ranges in enumerate(segments):
            parts, at = [], 0
            for begin, length in ranges:
                if dim == 0:
                    parts.append(Part(Box((expert, begin, 0), (1, length, cols)), at, 0))
                else:
                    parts.append(Part(Box((expert, 0, begin), (1, rows, length)), 0, at))
                at += length
            label = name + (f"[{expert}]" if experts > 1 else "") + (f"/{number}" if len(segments) > 1 else "")
            size = (at, cols) if dim == 0 else (rows, at)
            pieces.append(Piece(param, label, *size, tuple(parts)))
    return pieces
