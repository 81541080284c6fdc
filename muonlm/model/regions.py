"""Where tensor parallelism begins and ends in a layer (Megatron-LM, arXiv:1909.08053, operators f and g).

Between `enter` and `leave`, each rank of a group computes with its own heads, or its own columns of the hidden layer.
What enters is the same on all ranks, so that its gradient is the sum of theirs; what leaves is the sum of what they
computed, and its gradient is the same on all. One all_reduce each, in the dtype of the tensor, counted as
`tensor_all_reduce`. Without a group both are the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from muonlm.dist import collectives
from muonlm.dist.collectives import Group

_KIND = "tensor_all_reduce"


def local(weight: Tensor) -> Tensor:
    """The part of a weight on this rank, where it is a DTensor; any other tensor itself."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def enter(x: Tensor, group: Group) -> Tensor:
    """`x`; its gradient is summed over the ranks of `group`."""
    if group is None:
        return x
    out: Tensor = _Enter.apply(x, group)
    return out


def leave(x: Tensor, group: Group, *, keep: bool) -> Tensor:
    """The sum of the ranks' `x`, which is overwritten unless it is to `keep`; the gradient goes back as it is."""
    if group is None:
        return x
    out: Tensor = _Leave.apply(x.clone() if keep else x, group)
    return out


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`; its gradient is multiplied by `factor`."""
    out: Tensor = _ScaleGradient.apply(x, factor)
    return out


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may still need the gradient that it passed in.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        return collectives.all_reduce(grad, group=ctx.group, kind=_KIND), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(x)
        return collectives.all_reduce(x, group=group, kind=_KIND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
