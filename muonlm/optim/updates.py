"""The elementwise parts of a step, on what a rank holds: momentum, decay and addition, and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from muonlm.optim.shards import Shard

Group = dict[str, Any]
States = Sequence[dict[str, Any]]


def advance_momentum(group: Group, shards: Sequence[Shard], states: States, dtype: torch.dtype) -> list[torch.Tensor]:
    """Advance the momentum of a group's parameters; what is to be orthogonalized, flat and apart from it, in `dtype`.

    ema: M <- mu M + (1 - mu) G, U = (1 - mu) G + mu M; sum: M <- mu M + G, U = G + mu M; without Nesterov U = M.
    Computed in at least fp32, whatever gradients and state are kept in. Without a gradient M stays, and U is M.
    """
    mu, is_ema = group["momentum"], group["momentum_form"] == "ema"
    buffers = [shard.local_state(state["momentum_buffer"]) for shard, state in zip(shards, states, strict=True)]
    grads = [shard.grad() for shard in shards]
    live = [(i, g.to(torch.promote_types(g.dtype, torch.float32))) for i, g in enumerate(grads) if g is not None]
    wide = {i: buffers[i].to(g.dtype) for i, g in live}
    if live:
        moving, values = [wide[i] for i, _ in live], [g for _, g in live]
        if is_ema:
            torch._foreach_lerp_(moving, values, 1 - mu)
        else:
            torch._foreach_mul_(moving, mu)
            torch._foreach_add_(moving, values)
        for i, _ in live:
            if wide[i] is not buffers[i]:
                buffers[i].copy_(wide[i])
    updates = [wide.get(i, buffer) for i, buffer in enumerate(buffers)]
    if group["nesterov"]:
        for i, grad in live:
            updates[i] = torch.lerp(grad, wide[i], mu) if is_ema else torch.add(grad, wide[i], alpha=mu)
    is_new = {i for i, _ in live} if group["nesterov"] else set()  # the others are the state itself
    return [
        u.to(dtype, memory_format=torch.contiguous_format, copy=i not in is_new).contiguous().view(-1)
        for i, u in enumerate(updates)
    ]


def decay_and_add(group: Group, local: torch.Tensor, update: torch.Tensor, scale: float) -> None:
    """W <- (1 - lr wd) W - lr scale O, in place; cautious decay leaves weights that O moves away from zero alone."""
    lr, decay = float(group["lr"]), group["weight_decay"]
    if decay and group["cautious"]:
        local.mul_(1 - lr * decay * (update * local >= 0).to(local.dtype))
    elif decay:
        local.mul_(1 - lr * decay)
    local.add_(update, alpha=-lr * scale)


def adamw_step(group: Group, shards: Sequence[Shard], states: States) -> None:
    """torch's AdamW on the parameters that have a gradient, fused where they are dense in memory."""
    live = [(s, state, g) for s, state in zip(shards, states, strict=True) if (g := s.grad()) is not None]
    beta1, beta2 = group["betas"]
    # The fused kernel walks straight through memory: every tensor must be dense and laid out alike.
    is_dense = all(torch.empty_like(s.local()).stride() == s.local().stride() for s, _, _ in live)
    live = [(s, state, _laid_out_as(s.local(), g)) for s, state, g in live]
    adamw(
        [shard.local() for shard, _, _ in live],
        [grad for _, _, grad in live],
        [shard.local_state(state["exp_avg"]) for shard, state, _ in live],
        [shard.local_state(state["exp_avg_sq"]) for shard, state, _ in live],
        [],
        [state["step"] for _, state, _ in live],
        fused=is_dense,
        foreach=False,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _laid_out_as(local: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return grad if grad.stride() == local.stride() else torch.empty_like(local).copy_(grad)
