"""Executes a plan: gather the blocks of each matrix, orthogonalize it, scatter the result, round after round.

A round is one all_to_all of the inputs and one of the results, in the dtype of the updates; where every rank holds
everything, the inputs do not travel and one all_gather brings the results to all. Rounds overlap: while one is
computed, the inputs of the next `depth` are on their way, and so are the results of as many before it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.dist.agree import first_difference
from muonlm.dist.collectives import Group, Pending
from muonlm.optim.pieces import Piece
from muonlm.optim.plan import Plan, Round, Segment, Task

Orthogonalize = Callable[[torch.Tensor], torch.Tensor]
OrthogonalizePart = Callable[[torch.Tensor, Group], torch.Tensor]
Matrices = dict[Task, torch.Tensor]
Segments = dict[int, list[Segment]]


class _Transfer(NamedTuple):
    """A collective under way, and what it will have brought."""

    pending: Pending | None
    received: torch.Tensor
    segments: Segments
    stride: int | None  # elements between the parts of two ranks; None where they follow each other


class _Inputs(NamedTuple):
    """The matrices of a round's tasks, and the stacks that those of unshared ones are rows of."""

    matrices: Matrices
    stacks: list[tuple[list[Task], torch.Tensor]]


class Exchange:
    """Runs a plan on this rank. Construction compares the plans of all ranks and makes teams' groups.

    Collectives of the construction: one gather of a hash, and one new group for each team of ranks that share matrices.
    Raises UserError on all ranks when the plans differ, naming the first difference.
    """

    def __init__(self, plan: Plan, rank: int, depth: int = 1) -> None:
        self.plan, self.rank, self.depth = plan, rank, depth
        _check_equal(plan)
        teams = dict.fromkeys(team for team in plan.assignment.workers if len(team) > 1)
        self._teams = {team: collectives.team_group(team) for team in teams}

    @cached_property
    def rounds(self) -> list[Round]:
        """What this rank does in each round."""
        return [self.plan.round(number, self.rank) for number in range(self.plan.num_rounds)]

    @cached_property
    def blocks(self) -> list[list[tuple[Piece, Segment]]]:
        """For each parameter the matrices, or parts of matrices, that this rank holds of it."""
        return self.plan.blocks(self.rank)

    def run(
        self, updates: Sequence[torch.Tensor], orthogonalize: Orthogonalize, orthogonalize_part: OrthogonalizePart
    ) -> int:
        """Replace the updates, flat local tensors in the order of the plan's layouts, by the orthogonalized ones.

        `orthogonalize` maps a stack (K, M, N) to such a stack, and is called once a round for each shape that this
        rank computes; `orthogonalize_part` maps the rank's part (M, N / g) of a shared matrix, M its shorter side, and
        the group of its team. Returns how many matrices and parts this rank computed.

        Collectives: two all_to_all a round, or one all_gather; none with one rank; for shared matrices those of
        `muonlm.optim.shared`.
        """
        gathers: deque[_Transfer] = deque()
        scatters: deque[_Transfer] = deque()
        num_computed = 0
        for number, work in enumerate(self.rounds):
            while number + len(gathers) < len(self.rounds) and len(gathers) <= self.depth:
                gathers.append(self._start_gather(number + len(gathers), updates))
            inputs = self._assemble(work, updates, gathers.popleft())
            results = self._compute(inputs, work.tasks, orthogonalize, orthogonalize_part)
            num_computed += len(results)
            scatters.append(self._start_scatter(number, work, results, updates))
            while len(scatters) > self.depth:
                self._finish_scatter(scatters.popleft(), updates)
        while scatters:
            self._finish_scatter(scatters.popleft(), updates)
        return num_computed

    def _start_gather(self, number: int, updates: Sequence[torch.Tensor]) -> _Transfer:
        work = self.rounds[number]
        out = {rank: [s.view_of(updates[s.param]) for s in segments] for rank, segments in work.gather_out.items()}
        return self._start_all_to_all(number, out, work.gather_in, like=updates)

    def _start_scatter(self, number: int, work: Round, results: Matrices, updates: Sequence[torch.Tensor]) -> _Transfer:
        if self.plan.is_broadcast and self.plan.num_ranks > 1:
            own = [_placed(s, results) for s in work.scatter_out.get(self.rank, ())]
            return self._start_all_gather(number, own, work.scatter_in, like=updates)
        out = {rank: [_placed(s, results) for s in segments] for rank, segments in work.scatter_out.items()}
        transfer = self._start_all_to_all(number, out, work.scatter_in, like=updates)
        if kept := work.scatter_in.get(self.rank):
            torch._foreach_copy_([s.view_of(updates[s.param]) for s in kept], out[self.rank])
        return transfer

    def _start_all_to_all(
        self, number: int, out: dict[int, list[torch.Tensor]], incoming: Segments, like: Sequence[torch.Tensor]
    ) -> _Transfer:
        """Send views to other ranks. What a rank keeps is left out of both buffers."""
        ranks = range(self.plan.num_ranks)
        others = [rank for rank in ranks if rank != self.rank]
        sent = [0 if r == self.rank else sum(v.numel() for v in out.get(r, ())) for r in ranks]
        expected = [0 if r == self.rank else sum(s.numel for s in incoming.get(r, ())) for r in ranks]
        received = like[0].new_empty(sum(expected))
        if not self.plan.travels[number]:
            return _Transfer(None, received, {}, None)
        send = like[0].new_empty(sum(sent))
        _fill(send, [view for rank in others for view in out.get(rank, ())])
        pending = collectives.start_all_to_all(received, send, expected, sent)
        return _Transfer(pending, received, {r: incoming[r] for r in others if r in incoming}, None)

    def _start_all_gather(
        self, number: int, own: list[torch.Tensor], incoming: Segments, like: Sequence[torch.Tensor]
    ) -> _Transfer:
        longest = self.plan.broadcast_numel(number)
        send = like[0].new_zeros(longest)
        _fill(send, own)
        received = like[0].new_empty(self.plan.num_ranks * longest)
        pending = collectives.start_all_gather(received, send)
        return _Transfer(pending, received, incoming, longest)

    def _assemble(self, work: Round, updates: Sequence[torch.Tensor], transfer: _Transfer) -> _Inputs:
        """The inputs of this rank's tasks, whole matrices of one shape in one stack."""
        by_shape: dict[tuple[int, int], list[Task]] = defaultdict(list)
        matrices: Matrices = {}
        for task in work.tasks:
            if len(task.team) == 1:
                by_shape[self._shape(task)].append(task)
            else:
                matrices[task] = updates[0].new_empty(self._shape(task))
        stacks = [(tasks, updates[0].new_empty(len(tasks), *shape)) for shape, tasks in by_shape.items()]
        for tasks, stack in stacks:
            matrices.update(zip(tasks, stack.unbind(0), strict=True))
        if kept := work.gather_in.get(self.rank):
            torch._foreach_copy_([_placed(s, matrices) for s in kept], [s.view_of(updates[s.param]) for s in kept])
        _unpack(transfer, lambda segment: _placed(segment, matrices))
        return _Inputs(matrices, stacks)

    def _shape(self, task: Task) -> tuple[int, int]:
        piece = self.plan.pieces[task.piece]
        length = task.end - task.begin
        return (length, piece.cols) if piece.rows > piece.cols else (piece.rows, length)

    def _compute(
        self,
        inputs: _Inputs,
        tasks: Sequence[Task],
        orthogonalize: Orthogonalize,
        orthogonalize_part: OrthogonalizePart,
    ) -> Matrices:
        results: Matrices = {}
        for task in tasks:
            if len(task.team) > 1:
                piece, matrix = self.plan.pieces[task.piece], inputs.matrices[task]
                is_tall = piece.rows > piece.cols
                part = orthogonalize_part(matrix.mT if is_tall else matrix, self._teams[task.team])
                results[task] = part.mT if is_tall else part
        for members, stack in inputs.stacks:
            results.update(zip(members, orthogonalize(stack).unbind(0), strict=True))
        return results

    def _finish_scatter(self, transfer: _Transfer, updates: Sequence[torch.Tensor]) -> None:
        _unpack(transfer, lambda segment: segment.view_of(updates[segment.param]))


def _placed(segment: Segment, matrices: Matrices) -> torch.Tensor:
    """View of a segment in the matrix of its task."""
    _, rows, cols = segment.box.shape
    return matrices[segment.task][segment.row : segment.row + rows, segment.col : segment.col + cols]


def _fill(buffer: torch.Tensor, views: list[torch.Tensor]) -> None:
    """Copy blocks one after the other into a flat buffer."""
    if not views:
        return
    targets, at = [], 0
    for view in views:
        targets.append(buffer[at : at + view.numel()].view(view.shape))
        at += view.numel()
    torch._foreach_copy_(targets, views)


def _unpack(transfer: _Transfer, target: Callable[[Segment], torch.Tensor]) -> None:
    """Wait for a transfer and copy the blocks that it brought to where they belong."""
    if transfer.pending is not None:
        transfer.pending.wait()
    sources, targets, at = [], [], 0
    for rank in sorted(transfer.segments):
        if transfer.stride is not None:
            at = rank * transfer.stride
        for segment in transfer.segments[rank]:
            sources.append(transfer.received[at : at + segment.numel].view(segment.box.shape[1:]))
            targets.append(target(segment))
            at += segment.numel
    if targets:
        torch._foreach_copy_(targets, sources)


def _check_equal(plan: Plan) -> None:
    """Raise UserError on all ranks unless all have the same plan; then the lines themselves are compared too."""
    if len(set(collectives.gather_objects(plan.digest()))) == 1:
        return
    lines = collectives.gather_objects([plan.title, *plan.lines()])
    found = first_difference(lines)
    assert found is not None, "the hash is that of the lines"
    rank, difference = found
    raise UserError(
        f"rank {rank} would orthogonalize other matrices than rank 0 ({len(lines[rank]) - 1} against "
        f"{len(lines[0]) - 1}): {difference}. All ranks must build the same model, sharded alike, and the same "
        "optimizer"
    )
