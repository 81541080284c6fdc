"""Which rank holds which block of a parameter: one description for every way of sharding, pure data.

Every parameter is seen as a stack of matrices (E, out, in): a matrix has E = 1, an expert stack (E, out, in) is one
already, a convolution (out, in, *kernel) is one matrix (1, out, in * kernel). What a rank holds is a list of blocks of
that stack, each lying contiguously in the rank's local tensor; a sharding engine needs only a function that says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

Index = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a stack of matrices: where it starts, and its shape, in (E, out, in)."""

    start: Index
    shape: Index

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The block that both share, or None."""
        start = tuple(map(max, self.start, other.start))
        shape = tuple(
            min(a + m, b + n) - s for a, m, b, n, s in zip(self.start, self.shape, other.start, other.shape, start)
        )
        return None if min(shape) <= 0 else Box(start, shape)  # type: ignore[arg-type]

    def within(self, outer: Box) -> tuple[slice, slice, slice]:
        """Slices that cut this block out of a tensor of the shape of `outer`."""
        e, r, c = (slice(a - b, a - b + n) for a, b, n in zip(self.start, outer.start, self.shape))
        return e, r, c


def whole(shape: Index) -> Box:
    """The block that is everything."""
    return Box((0, 0, 0), shape)


@dataclass(frozen=True, slots=True)
class Holding:
    """A block that `rank` keeps, `offset` elements into its flat local tensor."""

    rank: int
    box: Box
    offset: int = 0


@dataclass(frozen=True)
class Layout:
    """Who holds what of one parameter seen as a stack `shape`; `key` says how it came about, for comparison."""

    shape: Index
    holdings: tuple[Holding, ...]
    key: str

    @cached_property
    def by_rank(self) -> dict[int, tuple[Holding, ...]]:
        """Holdings of each rank that has any."""
        out: dict[int, list[Holding]] = {}
        for holding in self.holdings:
            out.setdefault(holding.rank, []).append(holding)
        return {rank: tuple(held) for rank, held in out.items()}

    @cached_property
    def by_box(self) -> dict[Box, tuple[int, ...]]:
        """The ranks that hold each block, ascending."""
        out: dict[Box, list[int]] = {}
        for holding in self.holdings:
            out.setdefault(holding.box, []).append(holding.rank)
        return {box: tuple(sorted(ranks)) for box, ranks in out.items()}

    @cached_property
    def num_copies(self) -> int:
        """On how many ranks each element lies. Raises ValueError where that differs or elements are missing."""
        copies = {len(ranks) for ranks in self.by_box.values()}
        held = sum(box.numel for box in self.by_box)
        if len(copies) != 1 or held != math.prod(self.shape):
            raise ValueError(f"the pieces of {self.key} do not make up its {self.shape} elements once each")
        return copies.pop()

    @cached_property
    def is_replicated(self) -> bool:
        """Whether every holder has everything."""
        return all(holding.box.shape == self.shape for holding in self.holdings)

    def holders_of(self, box: Box) -> list[int]:
        """Ranks that hold all of `box` in one block, in order."""
        if box not in self._holders:
            found = {rank for held, ranks in self.by_box.items() if held.intersect(box) == box for rank in ranks}
            self._holders[box] = sorted(found)
        return self._holders[box]

    @cached_property
    def _holders(self) -> dict[Box, list[int]]:
        """What `holders_of` has found: parameters of one shape share a layout, and it takes a look at every block."""
        return {}

    def source(self, box: Box, receiver: int) -> int:
        """Which of the ranks that hold the block `box` sends it to `receiver`: one of its own replica, if it is in one.

        Ranks of a mesh are numbered so that the n-th holders of all blocks make up the n-th replica.
        """
        ranks = self.by_box[box]
        own = self.by_rank.get(receiver)
        replica = self.by_box[own[0].box].index(receiver) if own else receiver
        return ranks[replica % len(ranks)]


def as_stack(shape: Sequence[int], *, is_stack: bool) -> Index:
    """(E, out, in) of a parameter of two or more dims; `is_stack` says that the first of three is E.

    Raises ValueError for fewer than two dims.
    """
    if len(shape) < 2:
        raise ValueError(f"a parameter of shape {tuple(shape)} is no matrix")
    if is_stack:
        return shape[0], shape[1], math.prod(shape[2:])
    return 1, shape[0], math.prod(shape[1:])


def replicated(shape: Index, ranks: Iterable[int]) -> Layout:
    """Everything on each of `ranks`."""
    ranks = tuple(ranks)
    box = whole(shape)
    return Layout(shape, tuple(Holding(rank, box) for rank in ranks), f"{shape} replicated on {_short(ranks)}")


def flat_ranges(shape: Index, ranges: Iterable[tuple[int, int, int]]) -> Layout:
    """Ranges (rank, begin, end) of the flattened parameter, as ZeRO partitions cut it.

    On each rank its ranges lie one after the other, in the given order.
    """
    ranges = tuple(ranges)
    holdings: list[Holding] = []
    offsets: dict[int, int] = {}
    for rank, begin, end in ranges:
        for start, size in blocks_of_range(shape, begin, end):
            box = Box(start, size)  # type: ignore[arg-type]
            holdings.append(Holding(rank, box, offsets.get(rank, 0)))
            offsets[rank] = offsets.get(rank, 0) + box.numel
    return Layout(shape, tuple(holdings), f"{shape} in flat ranges {ranges}")


def blocks_of_range(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A range of a flattened tensor as blocks (start, size), in order: as few as there are, each contiguous."""
    while begin < end:
        # The largest block that starts here: of whole sub-tensors of the first dim at whose border it stands.
        dim, inner = 0, math.prod(shape[1:])
        while begin % inner or end - begin < inner:
            dim += 1
            inner //= shape[dim]
        index = begin // inner % shape[dim]
        count = min(shape[dim] - index, (end - begin) // inner)
        outer, rest = [], begin // (inner * shape[dim])
        for size in reversed(shape[:dim]):
            rest, i = divmod(rest, size)
            outer.append(i)
        start = (*reversed(outer), index, *(0 for _ in shape[dim + 1 :]))
        yield start, (*(1 for _ in shape[:dim]), count, *shape[dim + 1 :])
        begin += count * inner


@dataclass(frozen=True)
class MeshShard:
    """How one axis of a device mesh treats a parameter: replicated (dim None), or cut along `dim` of the stack.

    `unit` is how many columns of the stack one index of the parameter's own dim spans (1 but for convolutions). A
    `strided` shard cuts what the axes after it have cut already, as FSDP2 does to a tensor-parallel parameter.
    """

    dim: int | None
    unit: int = 1
    strided: bool = False


@lru_cache(maxsize=4096)
def mesh_layout(shape: Index, mesh: tuple[tuple[int, ...], tuple[int, ...]], axes: tuple[MeshShard, ...]) -> Layout:
    """Layout over a device mesh, given as (sizes of its axes, ranks in row-major order).

    A dim of n indices is cut over D ranks into pieces of ceil(n / D), as torch.chunk does: the last ones are shorter
    or empty. Ranks with nothing have no holding.
    """
    sizes, ranks = mesh
    order = sorted((i for i, axis in enumerate(axes) if axis.dim is not None), key=lambda i: (axes[i].strided, i))
    holdings = []
    for rank, coordinate in zip(ranks, product(*map(range, sizes))):
        start, length = [0, 0, 0], list(shape)
        for i in order:
            dim, unit = axes[i].dim, axes[i].unit
            assert dim is not None
            n = length[dim] // unit
            piece = -(-n // sizes[i])
            begin = min(piece * coordinate[i], n)
            start[dim] += begin * unit
            length[dim] = (min(begin + piece, n) - begin) * unit
        if min(length) > 0:
            holdings.append(Holding(rank, Box(tuple(start), tuple(length))))  # type: ignore[arg-type]
    kinds = ", ".join("copy" if a.dim is None else f"cut {a.dim}{' strided' if a.strided else ''}" for a in axes)
    return Layout(shape, tuple(holdings), f"{shape} over a mesh {sizes} of {_short(ranks)}: {kinds}")


def _short(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks and tuple(ranks) == tuple(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {','.join(map(str, ranks))}"
