"""What one rank does in the rounds of a plan, as few strided copies.

Blocks of one shape that lie equally far apart, both where they come from and where they go, are one copy: a stack of
experts takes one, whatever the number of experts. So that matrices of several parameters are one, too, updates lie in
storages that parameters share, in the order in which a rank stacks or sends them; where that is the whole stack, it is
orthogonalized as it lies. Pure data, but for the functions that make views and copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from muonlm.optim.layout import Index
from muonlm.optim.plan import Plan, Round, Segment, Task


class Place(NamedTuple):
    """Where a block begins: (matrix, row, column) of a stack, or (element, 0, 0) of a flat tensor.

    `buffer` is the number of the stack or tensor, `row_stride` the elements from row to row of a flat one, else None.
    """

    buffer: int
    start: Index
    row_stride: int | None

    def view(self, tensor: torch.Tensor, shape: Index, step: Index) -> torch.Tensor:
        """`shape[0]` blocks, each `step` after the one before, as a tensor of that shape."""
        strides = tensor.stride() if self.row_stride is None else (1, self.row_stride, 1)
        at, apart = (sum(i * stride for i, stride in zip(index, strides)) for index in (self.start, step))
        return tensor.as_strided(shape, (apart, *strides[1:]), tensor.storage_offset() + at)


class Copy(NamedTuple):
    """Blocks of shape (number, rows, cols), where the first one begins, and how far it is to the next."""

    shape: Index
    source: Place
    target: Place
    source_step: Index
    target_step: Index


class Traffic(NamedTuple):
    """One way of a round: what stays on the rank, what goes to the flat send buffer, and what the received one brings.

    `sizes_out` and `sizes_in` are the elements for and from each rank. `collective` is None where nothing travels
    between any two ranks.
    """

    collective: Literal["all_to_all", "all_gather"] | None
    kept: list[Copy]
    sent: list[Copy]
    received: list[Copy]
    sizes_out: list[int]
    sizes_in: list[int]


class Stack(NamedTuple):
    """Matrices (K, M, N) to be orthogonalized together, or one part of a matrix that `team` shares.

    `is_tall` says that the whole matrices have more rows than columns. `lies_at` is where all of them lie in the
    updates, in order; None where they are to be brought together.
    """

    shape: Index
    team: tuple[int, ...]
    is_tall: bool
    lies_at: Place | None


class Work(NamedTuple):
    """A round of one rank: copies from the updates to the stacks, and from the results to the updates."""

    stacks: list[Stack]
    gather: Traffic
    scatter: Traffic


@dataclass(frozen=True)
class Program:
    """All that a rank does. `storages` has for each flat tensor the parameters in it and their numbers of elements."""

    storages: list[list[tuple[int, int]]]
    rounds: list[Work]
    num_tasks: int


def run_copies(copies: Sequence[Copy], sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Carry copies out, whose buffers are those of the two lists. One multi-tensor call."""
    if copies:
        torch._foreach_copy_(
            [copy.target.view(targets[copy.target.buffer], copy.shape, copy.target_step) for copy in copies],
            [copy.source.view(sources[copy.source.buffer], copy.shape, copy.source_step) for copy in copies],
        )


def compile_plan(plan: Plan, rank: int) -> Program:
    """The program of `rank`."""
    rounds = [plan.round(number, rank) for number in range(plan.num_rounds)]
    storages = _storages(plan, rank, rounds)
    places: dict[int, tuple[int, int]] = {}
    for number, members in enumerate(storages):
        at = 0
        for param, numel in members:
            places[param] = number, at
            at += numel
    works = [_Compiler(plan, rank, number, work, places).work() for number, work in enumerate(rounds)]
    return Program(storages, works, sum(len(work.tasks) for work in rounds))


def _storages(plan: Plan, rank: int, rounds: Sequence[Round]) -> list[list[tuple[int, int]]]:
    """One for the parameters that first leave in one round, for one rank, for matrices of one shape."""
    members: dict[object, list[tuple[int, int]]] = {}
    numels = {
        param: sum(held.box.numel for held in layout.by_rank.get(rank, ())) for param, layout in enumerate(plan.layouts)
    }
    for number, work in enumerate(rounds):
        for worker in sorted(work.scatter_in, key=lambda worker: (worker != rank, worker)):
            # Those that are only copies of what another rank sends come last.
            for segment in (*work.gather_out.get(worker, ()), *work.scatter_in[worker]):
                if segment.param in numels:
                    key = number, worker, plan.shape_of(segment.task)
                    members.setdefault(key, []).append((segment.param, numels.pop(segment.param)))
    return [*members.values(), list(numels.items())]


class _Compiler:
    """One round: where everything lies, and the copies between."""

    def __init__(self, plan: Plan, rank: int, number: int, work: Round, places: dict[int, tuple[int, int]]) -> None:
        self._plan, self._rank, self._number, self._work, self._places = plan, rank, number, work, places
        self._stacks: dict[object, list[Task]] = {}
        for task in work.tasks:
            self._stacks.setdefault(task if len(task.team) > 1 else plan.shape_of(task), []).append(task)
        self._matrices = {task: (i, k) for i, tasks in enumerate(self._stacks.values()) for k, task in enumerate(tasks)}

    def work(self) -> Work:
        work, stacks = self._work, []
        gather = self._all_to_all(work.gather_out, work.gather_in, self._in_updates, self._in_stack)
        scatter = self._all_to_all(work.scatter_out, work.scatter_in, self._in_stack, self._in_updates)
        for index, (first, *rest) in enumerate(self._stacks.values()):
            shape = 1 + len(rest), *self._plan.shape_of(first)
            whole = [copy.source for copy in gather.kept if copy.target.buffer == index and _is_whole(copy, shape)]
            piece = self._plan.pieces[first.piece]
            stacks.append(Stack(shape, first.team, piece.rows > piece.cols, whole[0] if whole else None))
        kept = [copy for copy in gather.kept if stacks[copy.target.buffer].lies_at is None]
        return Work(stacks, gather._replace(kept=kept), self._all_gather() if self._plan.is_broadcast else scatter)

    def _all_to_all(
        self,
        out: dict[int, list[Segment]],
        incoming: dict[int, list[Segment]],
        source: Callable[[Segment], Place],
        target: Callable[[Segment], Place],
    ) -> Traffic:
        ranks = range(self._plan.num_ranks)
        others = [rank for rank in ranks if rank != self._rank]
        # What stays here is left out of both buffers.
        sizes = [
            [0 if rank == self._rank else sum(s.numel for s in way.get(rank, ())) for rank in ranks]
            for way in (out, incoming)
        ]
        is_idle = self._plan.is_broadcast or not self._plan.travels[self._number]
        return Traffic(
            None if is_idle else "all_to_all",
            _merged((s, source(s), target(s)) for s in incoming.get(self._rank, ())),
            _merged((s, source(s), place) for s, place in _on_wire(out, others)),
            _merged((s, place, target(s)) for s, place in _on_wire(incoming, others)),
            *sizes,
        )

    def _all_gather(self) -> Traffic:
        """Results to all: each rank sends as much as the one with the most, and gets its own back with the others'."""
        work, num_ranks, length = self._work, self._plan.num_ranks, self._plan.broadcast_numel(self._number)
        return Traffic(
            "all_gather",
            [],
            _merged((s, self._in_stack(s), place) for s, place in _on_wire(work.scatter_out, [self._rank])),
            _merged(
                (s, place, self._in_updates(s)) for s, place in _on_wire(work.scatter_in, range(num_ranks), length)
            ),
            [length],
            [length] * num_ranks,
        )

    def _in_updates(self, segment: Segment) -> Place:
        storage, at = self._places[segment.param]
        return Place(storage, (at + segment.offset, 0, 0), segment.held.box.shape[2])

    def _in_stack(self, segment: Segment) -> Place:
        index, matrix = self._matrices[segment.task]
        return Place(index, (matrix, segment.row, segment.col), None)


def _on_wire(
    segments: dict[int, list[Segment]], ranks: Iterable[int], length: int | None = None
) -> Iterator[tuple[Segment, Place]]:
    """Where segments lie in a flat buffer: one after the other, or those of each rank at its multiple of `length`."""
    at = 0
    for rank in ranks:
        at = at if length is None else rank * length
        for segment in segments.get(rank, ()):
            yield segment, Place(0, (at, 0, 0), segment.box.shape[2])
            at += segment.numel


def _merged(blocks: Iterable[tuple[Segment, Place, Place]]) -> list[Copy]:
    """Copies of single blocks, in order; those that go on where the one before has ended are joined to it."""
    out: list[Copy] = []
    for segment, source, target in blocks:
        rows, cols = segment.box.shape[1:]
        if out and (longer := _longer(out[-1], rows, cols, source, target)):
            out[-1] = longer
        else:
            out.append(Copy((1, rows, cols), source, target, (0, 0, 0), (0, 0, 0)))
    return out


def _longer(copy: Copy, rows: int, cols: int, source: Place, target: Place) -> Copy | None:
    """`copy` with one more block, if that is as far from the last one as they are from each other."""
    num = copy.shape[0]
    ends = (copy.source, copy.source_step, source), (copy.target, copy.target_step, target)
    if copy.shape[1:] != (rows, cols) or any(a._replace(start=b.start) != b for a, _, b in ends):
        return None
    steps = []
    for first, step, new in ends:
        if num == 1:
            step = tuple(b - a for a, b in zip(first.start, new.start))  # type: ignore[assignment]
        if min(step) < 0 or new.start != tuple(a + num * d for a, d in zip(first.start, step)):
            return None
        steps.append(step)
    return Copy((num + 1, rows, cols), copy.source, copy.target, *steps)


def _is_whole(copy: Copy, shape: Index) -> bool:
    """Whether the source of a copy is all of a stack of this shape, contiguous."""
    num, rows, cols = shape
    is_dense = copy.source.row_stride == cols and (num == 1 or copy.source_step == (rows * cols, 0, 0))
    return copy.shape == shape and is_dense
