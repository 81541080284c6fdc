"""What a training loop needs of an optimizer, whatever engine it works in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from muonlm.optim.gradients import GradNorms
from muonlm.optim.shards import Shard


class StepOptimizer(Protocol):
    """An optimizer that tells gradients and parameters by group; `muonlm.optim.muon.Muon` is one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with their names and settings."""

    def shards(self, group: dict[str, Any]) -> Sequence[Shard]:
        """What this process holds of each parameter of a group."""

    def clip_gradients(self, max_norm: float = 0.0) -> GradNorms:
        """Make sure that all ranks can take the next step, measure gradient norms, and clip those of AdamW groups."""

    def step(self) -> Any:
        """Take the step that `clip_gradients` has looked at, or leave it out."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
