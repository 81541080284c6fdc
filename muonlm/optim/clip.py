"""Gradient norms by group, clipping, and the search for what is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from muonlm.config.errors import UserError


class NonFiniteGradient(UserError):
    """A gradient holds NaN or infinity; the message names the parameters. Nothing has been updated."""


@dataclass(frozen=True)
class GradNorms:
    """L2 norms before clipping, and the factor that clipped groups were multiplied by (1 when nothing was)."""

    total: float
    by_group: dict[str, float]
    clip_factor: float


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> GradNorms:
    """Scale the gradients of the AdamW groups together to a norm of at most `max_norm`; 0 only measures.

    Groups under Muon are measured and left alone: orthogonalization takes the scale out anyhow, and a clip would only
    change how gradients weigh against each other in the momentum. Gradients must be the same on all ranks (averaged),
    then all ranks decide alike. One host synchronisation. Raises NonFiniteGradient before anything is changed.
    """
    groups = {g["name"]: [p.grad for p in g["params"] if p.grad is not None] for g in optimizer.param_groups}
    norms = {name: torch.stack(torch._foreach_norm(grads)) for name, grads in groups.items() if grads}
    by_group = dict(zip(norms, torch.stack([n.norm() for n in norms.values()]).tolist(), strict=True))
    total = math.hypot(*by_group.values())
    if not math.isfinite(total):
        raise NonFiniteGradient(f"non-finite gradient in {', '.join(_non_finite_names(optimizer))}")
    clipped = [g["name"] for g in optimizer.param_groups if g["rule"] == "adamw" and g["name"] in by_group]
    clipped_norm = math.hypot(*(by_group[name] for name in clipped))
    factor = 1.0
    if max_norm and clipped_norm > max_norm:
        factor = max_norm / clipped_norm
        torch._foreach_mul_([grad for name in clipped for grad in groups[name]], factor)
    return GradNorms(total, by_group, factor)


def _non_finite_names(optimizer: torch.optim.Optimizer) -> list[str]:
    names = []
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if param.grad is not None and not bool(torch.isfinite(param.grad).all()):
                names.append(name)
    # A norm can overflow although every entry is finite.
    return names or ["no single parameter: the norm over all of them overflows"]
