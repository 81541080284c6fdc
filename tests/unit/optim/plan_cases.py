"""What `make_plan` is given, drawn at random, and what every rank then holds of it: for tests of plans and copies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st

from muonlm.optim.layout import Box, Layout, MeshShard, flat_ranges, mesh_layout, replicated
from muonlm.optim.pieces import Piece, Split, pieces_of
from muonlm.optim.plan import Plan, Task, make_plan

NEVER = 2**63


@dataclass(frozen=True)
class Case:
    """Everything that `make_plan` is given."""

    layouts: list[Layout]
    pieces: list[Piece]
    ranks: int
    bucket_bytes: int
    split_min_flops: int
    pinned: frozenset[int]

    def plan(self) -> Plan:
        """The plan, with elements of four bytes."""
        return make_plan(
            self.pieces,
            self.layouts,
            self.ranks,
            element_bytes=4,
            bucket_bytes=self.bucket_bytes,
            split_min_flops=self.split_min_flops,
            pinned=self.pinned,
        )


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, int, int], sizes: tuple[int, ...]) -> Layout:
    """Replicas, flat ranges, or a cut of one or two dims, over all ranks of a mesh."""
    ranks = math.prod(sizes)
    kind = draw(st.sampled_from(["replicated", "flat", "mesh", "mesh", "mesh"]))
    if kind == "replicated":
        return replicated(shape, range(ranks))
    if kind == "flat":
        numel = math.prod(shape)
        cuts = draw(st.lists(st.integers(0, numel), max_size=ranks - 1))
        borders = sorted({0, numel, *cuts})
        owners = draw(st.permutations(range(ranks)))
        return flat_ranges(shape, [(owners[i], a, b) for i, (a, b) in enumerate(pairwise(borders))])
    dims = [draw(st.sampled_from([None, 0, 1, 2])) for _ in sizes]
    strided = len(dims) == 2 and dims[0] == dims[1] is not None
    axes = tuple(MeshShard(dim, strided=strided and number == 0) for number, dim in enumerate(dims))
    return mesh_layout(shape, (sizes, tuple(range(ranks))), axes)


@st.composite
def splits(draw: st.DrawFn, shape: tuple[int, int, int]) -> Split | None:
    """Some division of the rows or columns of a weight, or none."""
    dim = draw(st.integers(0, 1))
    groups = draw(st.sampled_from([n for n in (1, 2, 3) if shape[1 + dim] % n == 0]))
    period = shape[1 + dim] // groups
    cuts = draw(st.lists(st.integers(1, period), max_size=2))
    sizes = tuple(b - a for a, b in pairwise(sorted({0, period, *cuts})))
    split = Split(sizes, groups, separate_groups=draw(st.booleans()), dim=dim)
    return draw(st.sampled_from([None, split]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A few parameters, each in a layout and a split of its own."""
    sizes = draw(st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (2, 3)]))
    all_layouts, pieces = [], []
    for index in range(draw(st.integers(1, 4))):
        shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)))
        all_layouts.append(draw(layouts(shape, sizes)))
        pieces += pieces_of(index, f"p{index}", shape, draw(splits(shape)))
    return Case(
        layouts=all_layouts,
        pieces=pieces,
        ranks=math.prod(sizes),
        bucket_bytes=draw(st.sampled_from([1, 100, 400, 2**20])),
        split_min_flops=draw(st.sampled_from([0, NEVER])),
        pinned=frozenset(draw(st.sets(st.integers(0, len(all_layouts) - 1)))),
    )


def whole(case: Case, param: int) -> torch.Tensor:
    """A parameter whose elements are their own numbers."""
    shape = case.layouts[param].shape
    return torch.arange(math.prod(shape)).view(shape)


def matrix_of(case: Case, piece: Piece) -> torch.Tensor:
    """The matrix that a piece is, cut out of its parameter."""
    out = torch.full((piece.rows, piece.cols), -1)
    values = whole(case, piece.param)
    everything = Box((0, 0, 0), case.layouts[piece.param].shape)
    for part in piece.parts:
        block = values[part.box.within(everything)][0]
        out[part.row : part.row + block.shape[0], part.col : part.col + block.shape[1]] = block
    return out


def locals_of(case: Case, rank: int) -> list[torch.Tensor]:
    """What a rank holds of each parameter, flat."""
    out = []
    for param, layout in enumerate(case.layouts):
        everything = Box((0, 0, 0), layout.shape)
        held = layout.by_rank.get(rank, ())
        flat = torch.full((sum(holding.box.numel for holding in held),), -1)
        for holding in held:
            block = whole(case, param)[holding.box.within(everything)].reshape(-1)
            flat[holding.offset : holding.offset + len(block)] = block
        out.append(flat)
    return out


def expected_of(case: Case, task: Task) -> torch.Tensor:
    """The matrix, or part of its longer side, that a task works on."""
    piece = case.pieces[task.piece]
    matrix = matrix_of(case, piece)
    return matrix[task.begin : task.end] if piece.rows > piece.cols else matrix[:, task.begin : task.end]
