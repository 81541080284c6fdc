"""The plan of an exchange: which matrices there are, who computes them, in which round, and what travels for that.

Pure data, made from layouts alone: it can be printed, hashed, and made for any number of ranks without starting one.

Work goes in rounds. In each round a rank receives the blocks of the matrices that it is to compute, computes them, and
sends every holder its blocks of the results. `bucket_bytes` bounds what a rank assembles in one round.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from muonlm.optim.assign import SPLIT_MIN_FLOPS, Assignment, Job, assign
from muonlm.optim.layout import Box, Holding, Layout
from muonlm.optim.pieces import Piece

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Task:
    """A matrix, or the part of its longer side from `begin` on, that one rank computes in a round.

    Fields:
        piece: index of the matrix.
        worker: the rank.
        team: all ranks that share the matrix; only the worker where it is not shared.
        begin, end: the part; 0 and the length of the longer side where it is not shared.
    """

    piece: int
    worker: int
    team: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Segment:
    """A block that lies at `source` in a rank's local tensor of `param` and at (row, col) of a task's matrix.

    `held` is the holding's block and offset; `box` the part of it that travels; shapes are (1, rows, cols).
    """

    param: int
    held: Holding
    box: Box
    task: Task
    row: int
    col: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.box.numel

    @property
    def offset(self) -> int:
        """Where the block begins in the rank's local tensor of the parameter, flat and contiguous."""
        _, rows, cols = self.held.box.shape
        e, r, c = (a - b for a, b in zip(self.box.start, self.held.box.start))
        return self.held.offset + (e * rows + r) * cols + c

    def view_of(self, flat: torch.Tensor) -> torch.Tensor:
        """This block as a matrix, from that tensor."""
        return flat.as_strided(self.box.shape[1:], (self.held.box.shape[2], 1), flat.storage_offset() + self.offset)


@dataclass(frozen=True)
class Round:
    """What one rank does in a round: segments in the order in which they travel, by the rank at the other end.

    Fields:
        tasks: what this rank computes, shared matrices first.
        gather_out, gather_in: segments of this rank's holdings for others' tasks; of others' for this rank's tasks.
        scatter_out, scatter_in: segments of this rank's results for the holders; of others' results for its holdings.

    What a rank exchanges with itself is listed too, under its own number.
    """

    tasks: tuple[Task, ...]
    gather_out: dict[int, list[Segment]]
    gather_in: dict[int, list[Segment]]
    scatter_out: dict[int, list[Segment]]
    scatter_in: dict[int, list[Segment]]


@dataclass(frozen=True)
class Plan:
    """The whole plan, the same on every rank.

    Fields:
        pieces: the matrices.
        layouts: those of the parameters that pieces refer to.
        assignment: who computes them.
        rounds: the round of each matrix.
        num_ranks: size of the group.
        element_bytes: bytes of an element on the wire.
        steps: Newton-Schulz steps, for the FLOPs.
    """

    pieces: tuple[Piece, ...]
    layouts: tuple[Layout, ...]
    assignment: Assignment
    rounds: tuple[int, ...]
    num_ranks: int
    element_bytes: int
    steps: int

    @cached_property
    def num_rounds(self) -> int:
        """Number of rounds."""
        return max(self.rounds, default=-1) + 1

    @cached_property
    def is_broadcast(self) -> bool:
        """Each of several ranks holds every parameter whole: inputs do not travel, and all results go to all ranks."""
        is_everywhere = all(layout.is_replicated and len(layout.by_rank) == self.num_ranks for layout in self.layouts)
        return is_everywhere and self.num_ranks > 1

    @cached_property
    def travels(self) -> list[bool]:
        """For each round whether anything in it goes from one rank to another."""
        out = [False] * self.num_rounds
        for piece, team, number in zip(self.pieces, self.assignment.workers, self.rounds, strict=True):
            layout = self.layouts[piece.param]
            if len(team) == 1 and layout.holders_of(piece.bounds) == [*team]:
                continue  # as with experts: a look at every block of every stack would take seconds
            out[number] = out[number] or any(
                (ranks != team or len(team) > 1) and any(box.intersect(part.box) for part in piece.parts)
                for box, ranks in layout.by_box.items()
            )
        return out

    @property
    def title(self) -> str:
        """What the plan is for, in one line."""
        return f"{self.num_ranks} ranks, {self.element_bytes} bytes, {self.steps} steps"

    def lines(self) -> list[str]:
        """One line a matrix: what it is, how it is held, who computes it, when."""
        return [
            f"{piece.label} {piece.rows}x{piece.cols}{_made_of(piece)}: {self.layouts[piece.param].key}; "
            f"computed by {','.join(map(str, workers))} in round {number}"
            for piece, workers, number in zip(self.pieces, self.assignment.workers, self.rounds, strict=True)
        ]

    def digest(self) -> str:
        """Hash of everything, to compare across ranks."""
        return hashlib.sha256("\n".join([self.title, *self.lines()]).encode()).hexdigest()

    def tasks(self, index: int) -> list[Task]:
        """The tasks of a matrix, one for each rank that works on it."""
        piece, team = self.pieces[index], self.assignment.workers[index]
        length = max(piece.rows, piece.cols)
        part = -(-length // len(team))
        return [
            Task(index, rank, team, min(i * part, length), min((i + 1) * part, length)) for i, rank in enumerate(team)
        ]

    def shape_of(self, task: Task) -> tuple[int, int]:
        """Rows and columns of a task's matrix or part."""
        piece = self.pieces[task.piece]
        length = task.end - task.begin
        return (length, piece.cols) if piece.rows > piece.cols else (piece.rows, length)

    def round(self, number: int, rank: int) -> Round:
        """What `rank` does in round `number`."""
        out = Round((), {}, {}, {}, {})
        own: list[Task] = []
        for index in self._pieces_by_round[number]:
            layout = self.layouts[self.pieces[index].param]
            for task in self.tasks(index):
                if task.worker == rank:
                    own.append(task)
                self._add_segments(out, layout, task, rank)
        own.sort(key=lambda task: len(task.team) == 1)  # stable: shared ones first, in the order of all ranks
        return Round(tuple(own), out.gather_out, out.gather_in, out.scatter_out, out.scatter_in)

    def _add_segments(self, out: Round, layout: Layout, task: Task, rank: int) -> None:
        is_worker = task.worker == rank
        ranks = layout.by_rank if is_worker else [r for r in (rank,) if r in layout.by_rank]
        for holder in ranks:
            for segment in self._segments(task, layout.by_rank[holder]):
                sends = holder == layout.source(segment.held.box, task.worker)
                if holder == rank:
                    out.scatter_in.setdefault(task.worker, []).append(segment)
                    if sends:
                        out.gather_out.setdefault(task.worker, []).append(segment)
                if is_worker:
                    out.scatter_out.setdefault(holder, []).append(segment)
                    if sends:
                        out.gather_in.setdefault(holder, []).append(segment)

    def _segments(self, task: Task, holdings: Sequence[Holding]) -> list[Segment]:
        piece = self.pieces[task.piece]
        is_tall = piece.rows > piece.cols
        segments = []
        for held in holdings:
            for part in piece.parts:
                box = part.box.intersect(held.box)
                if box is None:
                    continue
                row = part.row + box.start[1] - part.box.start[1]
                col = part.col + box.start[2] - part.box.start[2]
                if len(task.team) > 1:
                    clipped = _clip(box, row, col, task, is_tall)
                    if clipped is None:
                        continue
                    box, row, col = clipped
                segments.append(Segment(piece.param, held, box, task, row, col))
        return segments

    def blocks(self, rank: int) -> list[dict[tuple[int, int], list[Segment]]]:
        """For each parameter the matrices, or parts of matrices, that `rank` holds of it, by the matrix's shape."""
        out: list[dict[tuple[int, int], list[Segment]]] = [{} for _ in self.layouts]
        for index, piece in enumerate(self.pieces):
            everything = Task(index, rank, (rank,), 0, max(piece.rows, piece.cols))
            held = self.layouts[piece.param].by_rank.get(rank, ())
            if segments := self._segments(everything, held):
                out[piece.param].setdefault((piece.rows, piece.cols), []).extend(segments)
        return out

    @cached_property
    def _pieces_by_round(self) -> list[list[int]]:
        """Matrices of one shape together: then the blocks that travel are few runs of equal ones."""
        out: list[list[int]] = [[] for _ in range(self.num_rounds)]
        for index in sorted(range(len(self.pieces)), key=lambda i: (self.pieces[i].rows, self.pieces[i].cols)):
            out[self.rounds[index]].append(index)
        return out

    def bytes_sent(self, rank: int) -> dict[str, int]:
        """Bytes that `rank` sends to others in a step, by phase: all_to_all both ways, or one all_gather a round.

        On a ring an all_gather sends each rank's contribution, padded to the longest, D - 1 times.
        """
        total = {"gather": 0, "scatter": 0}
        for number in range(self.num_rounds):
            work = self.round(number, rank)
            if self.is_broadcast:
                total["scatter"] += (self.num_ranks - 1) * self.broadcast_numel(number) * self.element_bytes
                continue
            for phase, out in (("gather", work.gather_out), ("scatter", work.scatter_out)):
                total[phase] += self.element_bytes * sum(s.numel for r, ss in out.items() if r != rank for s in ss)
        return total

    def broadcast_numel(self, number: int) -> int:
        """Elements that each rank contributes to the all_gather of a round: those of the rank with the most."""
        totals: dict[int, int] = defaultdict(int)
        for index in self._pieces_by_round[number]:
            for task in self.tasks(index):
                totals[task.worker] += math.prod(self.shape_of(task))
        return max(totals.values(), default=0)


def make_plan(
    pieces: Sequence[Piece],
    layouts: Sequence[Layout],
    num_ranks: int,
    *,
    element_bytes: int = 2,
    bucket_bytes: int = 2**27,
    steps: int = 5,
    split_min_flops: int = SPLIT_MIN_FLOPS,
    pinned: frozenset[int] = frozenset(),
) -> Plan:
    """Assign the matrices and sort them into rounds.

    `pinned` are the parameters whose matrices must be computed where they lie whole, if they do: expert stacks, and
    what an engine has given owners already. Matrices of one shape go into the same rounds as far as possible.
    """
    jobs = []
    for piece in pieces:
        layout = layouts[piece.param]
        holders = layout.holders_of(piece.bounds)
        anywhere = len(holders) == num_ranks
        jobs.append(
            Job(
                piece.rows,
                piece.cols,
                () if anywhere else tuple(holders),
                pinned=bool(holders) and not anywhere and piece.param in pinned,
            )
        )
    assignment = assign(jobs, num_ranks, steps, split_min_flops)
    rounds = _rounds(pieces, assignment, element_bytes, bucket_bytes)
    return Plan(tuple(pieces), tuple(layouts), assignment, rounds, num_ranks, element_bytes, steps)


def _rounds(pieces: Sequence[Piece], assignment: Assignment, element_bytes: int, bucket_bytes: int) -> tuple[int, ...]:
    """Fill rounds greedily: a matrix goes to the first round from which on all of its workers have room."""
    filled: dict[int, tuple[int, int]] = {}  # rank -> (round, bytes in it)
    rounds = [0] * len(pieces)
    # Shared matrices first: the ranks of a team must come to them in the same round.
    order = sorted(
        range(len(pieces)),
        key=lambda i: (len(assignment.workers[i]) == 1, pieces[i].rows, pieces[i].cols, i),
    )
    for index in order:
        team = assignment.workers[index]
        size = pieces[index].rows * pieces[index].cols * element_bytes // len(team)
        states = [filled.get(rank, (0, 0)) for rank in team]
        number = max(n if not used or used + size <= bucket_bytes else n + 1 for n, used in states)
        for rank, (n, used) in zip(team, states, strict=True):
            filled[rank] = (number, (used if n == number else 0) + size)
        rounds[index] = number
    return tuple(rounds)


def _made_of(piece: Piece) -> str:
    """Where the blocks of a matrix lie in its parameter, if there are several."""
    blocks = [f"{part.box.start}+{part.box.shape}" for part in piece.parts]
    return f" made of {', '.join(blocks)}" if len(blocks) > 1 else ""


def _clip(box: Box, row: int, col: int, task: Task, is_tall: bool) -> tuple[Box, int, int] | None:
    """The part of a block that falls into a task's part of the longer side, and its place in that part."""
    dim = 1 if is_tall else 2
    at = row if is_tall else col
    begin, end = max(at, task.begin), min(at + box.shape[dim], task.end)
    if begin >= end:
        return None
    start, shape = list(box.start), list(box.shape)
    start[dim] += begin - at
    shape[dim] = end - begin
    new = Box((start[0], start[1], start[2]), (shape[0], shape[1], shape[2]))
    return new, (begin - task.begin if is_tall else row), (col if is_tall else begin - task.begin)
