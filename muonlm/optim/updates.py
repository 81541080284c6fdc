"""The elementwise parts of a step, on what a rank holds: momentum, decay and addition, and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from muonlm.optim.shards import Shard

Group = dict[str, Any]
States = Sequence[dict[str, Any]]
Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]
# What is computed in fp32 on the way to the updates is bounded: it would be as large as all momentum together.
_NUMEL_AT_A_TIME = 2**25


def advance_momentum(group: Group, shards: Sequence[Shard], states: States, updates: Sequence[torch.Tensor]) -> None:
    """Advance the momentum of a group's parameters, and write what is to be orthogonalized to `updates`, rounded.

    ema: M <- mu M + (1 - mu) G, U = (1 - mu) G + mu M; sum: M <- mu M + G, U = G + mu M; without Nesterov U = M.
    Computed in at least fp32, whatever gradients and state are kept in, some parameters at a time. Without a gradient
    M stays, and U is M. `updates` are contiguous, of any shape and dtype.
    """
    buffers = [shard.local_state(state["momentum_buffer"]) for shard, state in zip(shards, states, strict=True)]
    targets = [update.view(buffer.shape) for update, buffer in zip(updates, buffers, strict=True)]
    grads = [shard.grad() for shard in shards]
    if still := [i for i, grad in enumerate(grads) if grad is None]:
        torch._foreach_copy_([targets[i] for i in still], [buffers[i] for i in still])
    live = [(g, buffer, target) for g, buffer, target in zip(grads, buffers, targets, strict=True) if g is not None]
    while live:
        num, numel = 0, 0
        while num < len(live) and (not num or numel + live[num][0].numel() <= _NUMEL_AT_A_TIME):
            numel += live[num][0].numel()
            num += 1
        _advance(group, *(list(column) for column in zip(*live[:num], strict=True)))
        del live[:num]


def _advance(group: Group, grads: Tensors, buffers: Tensors, targets: Tensors) -> None:
    mu, is_ema = group["momentum"], group["momentum_form"] == "ema"
    grads = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    moving: Tensors = [buffer.to(grad.dtype) for buffer, grad in zip(buffers, grads, strict=True)]
    if is_ema:
        torch._foreach_lerp_(moving, grads, 1 - mu)
    else:
        torch._foreach_mul_(moving, mu)
        torch._foreach_add_(moving, grads)
    if rounded := [i for i, buffer in enumerate(buffers) if moving[i] is not buffer]:
        torch._foreach_copy_([buffers[i] for i in rounded], [moving[i] for i in rounded])
    if group["nesterov"]:
        moving = torch._foreach_lerp(grads, moving, mu) if is_ema else torch._foreach_add(grads, moving, alpha=mu)
    torch._foreach_copy_(targets, moving)


def decay_and_add(group: Group, weights: Tensors, updates: Tensors, scales: Sequence[float]) -> None:
    """W <- (1 - lr wd) W - lr scale O, in place; cautious decay leaves weights that O moves away from zero alone."""
    lr, decay = float(group["lr"]), group["weight_decay"]
    if decay and group["cautious"]:
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - lr * decay * (update * weight >= 0).to(weight.dtype))
    elif decay and weights:
        torch._foreach_mul_(weights, 1 - lr * decay)
    for scale in dict.fromkeys(scales):
        chosen = [i for i, other in enumerate(scales) if other == scale]
        torch._foreach_add_([weights[i] for i in chosen], [updates[i] for i in chosen], alpha=-lr * scale)


def adamw_step(group: Group, shards: Sequence[Shard], states: States) -> None:
    """torch's AdamW on the parameters that have a gradient, fused where they are dense in memory."""
    live = [(s, state, g) for s, state in zip(shards, states, strict=True) if (g := s.grad()) is not None]
    beta1, beta2 = group["betas"]
    # The fused kernel walks straight through memory: every tensor must be dense and laid out alike.
    values = [shard.local() for shard, _, _ in live]
    is_dense = all(x.is_contiguous() or torch.empty_like(x).stride() == x.stride() for x in values)
    live = [(s, state, _laid_out_as(x, g)) for x, (s, state, g) in zip(values, live, strict=True)]
    adamw(
        values,
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
