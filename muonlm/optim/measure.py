"""How far a step moved the parameters, by group."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

import torch


class UpdateNorms:
    """Context manager around `optimizer.step()`: L2 norm and RMS of the change of each group's parameters.

    Holds one copy of the parameters while it is open, so it is meant for the steps that are recorded. After exit
    `by_group` maps group name to the norm, `rms_by_group` to norm / sqrt(number of elements).
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = {group["name"]: group["params"] for group in optimizer.param_groups}
        self.by_group: dict[str, float] = {}
        self.rms_by_group: dict[str, float] = {}

    @torch.no_grad()
    def __enter__(self) -> Self:
        self._before = {name: [p.detach().clone() for p in params] for name, params in self._groups.items()}
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            for name, params in self._groups.items():
                change = torch._foreach_sub(self._before[name], list(params))
                self.by_group[name] = float(torch.stack(torch._foreach_norm(change)).norm())
                self.rms_by_group[name] = self.by_group[name] / math.sqrt(sum(p.numel() for p in params))
        del self._before
