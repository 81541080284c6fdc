"""How far a step moved the parameters, by group."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

import torch

from muonlm.dist import collectives
from muonlm.optim.stepping import StepOptimizer


class UpdateNorms:
    """Context manager around `optimizer.step()`: L2 norm and RMS of the change of each group's parameters.

    Holds one copy of this rank's parameters while it is open, so it is meant for the steps that are recorded. After
    exit `by_group` maps group name to the norm over all ranks, `rms_by_group` to norm / sqrt(number of elements). One
    all_reduce of a number for each group when there are ranks.
    """

    def __init__(self, optimizer: StepOptimizer) -> None:
        self._groups = {group["name"]: optimizer.shards(group) for group in optimizer.param_groups}
        self.by_group: dict[str, float] = {}
        self.rms_by_group: dict[str, float] = {}

    @torch.no_grad()
    def __enter__(self) -> Self:
        self._before = {name: [s.local().detach().clone() for s in shards] for name, shards in self._groups.items()}
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = self._before
        del self._before
        if error is not None:
            return
        squares = []
        for name, shards in self._groups.items():
            torch._foreach_sub_(before[name], [shard.local() for shard in shards])
            norms = torch.stack(torch._foreach_norm(before[name])).double()
            copies = torch.tensor([shard.layout.num_copies for shard in shards], device=norms.device)
            squares.append((norms.square() / copies).sum())
        total = collectives.all_reduce(torch.stack(squares)).sqrt().tolist()
        for (name, shards), norm in zip(self._groups.items(), total, strict=True):
            self.by_group[name] = norm
            self.rms_by_group[name] = norm / math.sqrt(sum(math.prod(shard.layout.shape) for shard in shards))
