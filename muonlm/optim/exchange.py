"""Executes a plan: gather the blocks of each matrix, orthogonalize it, scatter the result, round after round.

A round is one all_to_all of the inputs and one of the results, in the dtype of the updates; where every rank holds
everything, the inputs do not travel and one all_gather brings the results to all. Rounds overlap: while one is
computed, the inputs of the next `depth` are on their way, and so are the results of as many before it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.dist.agree import first_difference
from muonlm.dist.collectives import Group, Pending
from muonlm.optim.copies import Copy, Stack, Traffic, Work, compile_plan, run_copies
from muonlm.optim.plan import Plan, Segment

Orthogonalize = Callable[[torch.Tensor], torch.Tensor]
OrthogonalizePart = Callable[[torch.Tensor, Group], torch.Tensor]
Blocks = dict[tuple[int, int], list[Segment]]


class Updates(NamedTuple):
    """What a rank holds of the updates of all parameters, flat, each a part of one of the storages."""

    storages: list[torch.Tensor]
    by_param: list[torch.Tensor]


class _Transfer(NamedTuple):
    """A collective under way, what it will have brought, and where that belongs."""

    pending: Pending | None
    received: torch.Tensor
    copies: list[Copy]

    def finish(self, targets: Sequence[torch.Tensor]) -> None:
        """Wait, and copy to `targets`."""
        if self.pending is not None:
            self.pending.wait()
        run_copies(self.copies, [self.received], targets)


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
        self._program = compile_plan(plan, rank)

    @property
    def num_tasks(self) -> int:
        """How many matrices, and parts of matrices, this rank computes in a step."""
        return self._program.num_tasks

    @cached_property
    def blocks(self) -> list[Blocks]:
        """For each parameter the matrices, or parts of matrices, that this rank holds of it, by the matrix's shape."""
        return self.plan.blocks(self.rank)

    def new_updates(self, dtype: torch.dtype, device: torch.device) -> Updates:
        """Memory for the updates, in the order of the plan's layouts; what is in it is not defined."""
        storages, by_param = [], [torch.empty(0)] * len(self.plan.layouts)
        for members in self._program.storages:
            numels = [numel for _, numel in members]
            storages.append(torch.empty(sum(numels), dtype=dtype, device=device))
            for (param, _), part in zip(members, storages[-1].split(numels), strict=True):
                by_param[param] = part
        return Updates(storages, by_param)

    def run(self, updates: Updates, orthogonalize: Orthogonalize, orthogonalize_part: OrthogonalizePart) -> int:
        """Replace the updates by the orthogonalized ones.

        `orthogonalize` maps a stack (K, M, N) to such a stack, and is called once a round for each shape that this
        rank computes; `orthogonalize_part` maps the rank's part (M, N / g) of a shared matrix, M its shorter side, and
        the group of its team. Returns how many matrices and parts this rank computed.

        Collectives: two all_to_all a round, or one all_gather; none with one rank; for shared matrices those of
        `muonlm.optim.shared`. Copies and calls on the host do not become more with the matrices of a stack.
        """
        storages, rounds = updates.storages, self._program.rounds
        gathers: deque[_Transfer] = deque()
        scatters: deque[_Transfer] = deque()
        num_computed = 0
        for number, work in enumerate(rounds):
            while number + len(gathers) < len(rounds) and len(gathers) <= self.depth:
                gathers.append(_start(rounds[number + len(gathers)].gather, storages, like=storages[0]))
            inputs = _assemble(work, storages, gathers.popleft())
            results = [
                self._compute(stack, matrices, orthogonalize, orthogonalize_part)
                for stack, matrices in zip(work.stacks, inputs, strict=True)
            ]
            num_computed += sum(map(len, results))
            scatters.append(_start(work.scatter, results, like=storages[0]))
            run_copies(work.scatter.kept, results, storages)
            while len(scatters) > self.depth:
                scatters.popleft().finish(storages)
        while scatters:
            scatters.popleft().finish(storages)
        return num_computed

    def _compute(
        self,
        stack: Stack,
        matrices_KMN: torch.Tensor,
        orthogonalize: Orthogonalize,
        orthogonalize_part: OrthogonalizePart,
    ) -> torch.Tensor:
        if len(stack.team) == 1:
            return orthogonalize(matrices_KMN)
        matrix = matrices_KMN[0].mT if stack.is_tall else matrices_KMN[0]
        part = orthogonalize_part(matrix, self._teams[stack.team])[None]
        return part.mT if stack.is_tall else part


def _start(traffic: Traffic, sources: Sequence[torch.Tensor], like: torch.Tensor) -> _Transfer:
    """Start to send blocks of `sources` through buffers like `like`."""
    received = like.new_empty(sum(traffic.sizes_in))
    if traffic.collective is None:
        return _Transfer(None, received, [])
    send = like.new_empty(sum(traffic.sizes_out))
    run_copies(traffic.sent, sources, [send])
    if traffic.collective == "all_gather":
        pending = collectives.start_all_gather(received, send)
    else:
        pending = collectives.start_all_to_all(received, send, traffic.sizes_in, traffic.sizes_out)
    return _Transfer(pending, received, traffic.received)


def _assemble(work: Work, storages: Sequence[torch.Tensor], transfer: _Transfer) -> list[torch.Tensor]:
    """The stacks of a round: as they lie in the updates, or brought together from there and from other ranks."""
    stacks = []
    for stack in work.stacks:
        if stack.lies_at is None:
            stacks.append(storages[0].new_empty(stack.shape))
        else:
            begin, numel = stack.lies_at.start[0], math.prod(stack.shape)
            stacks.append(storages[stack.lies_at.buffer][begin : begin + numel].view(stack.shape))
    run_copies(work.gather.kept, storages, stacks)
    transfer.finish(stacks)
    return stacks


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
