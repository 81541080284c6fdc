"""A stack of experts applied to tokens that are sorted by expert: three implementations of one function.

`experts_reference` is a plain composition. `experts_loop` is one autograd function of matrix products on slices, for
CPUs: it saves what the backward pass needs and no more, and writes where the results are to be. `experts_grouped` gives
the products of all experts to one grouped kernel, for GPUs.

Every row's output is multiplied by its routing weight, inside, before the last product: that is narrower than its
result, which then needs no saving. Shape suffixes: S rows (a token for each of its experts), D hidden, F width of an
expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from muonlm.model.layers import activate, compute_dtype

Experts = Callable[[Tensor, Tensor, Tensor, list[Tensor], str], Tensor]
_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def experts_reference(x_SD: Tensor, scale_S: Tensor, counts_E: Tensor, weights: list[Tensor], kind: str) -> Tensor:
    """The experts' outputs, each times the routing weight of its row.

    Args:
        x_SD: rows sorted by expert.
        scale_S: routing weights, fp32.
        counts_E: int64 numbers of rows of each expert.
        weights: gate (E, F, D) unless ungated, up (E, F, D), down (E, D, F).
        kind: activation, see `layers.activate`.

    Returns:
        (S, D) in the compute dtype.
    """
    outputs = []
    for number, (x, scale) in enumerate(zip(x_SD.split(counts_E.tolist()), scale_S.split(counts_E.tolist()))):
        *gate, up = (F.linear(x, weight[number]) for weight in weights[:-1])
        hidden = activate(gate[0] if gate else None, up, kind, plain=True)
        outputs.append(F.linear(hidden * scale[:, None].to(hidden.dtype), weights[-1][number]))
    return torch.cat(outputs)


def experts_grouped(x_SD: Tensor, scale_S: Tensor, counts_E: Tensor, weights: list[Tensor], kind: str) -> Tensor:
    """Same as `experts_reference` in grouped products; on GPUs it takes bfloat16, and nothing waits for the counts."""
    if _grouped_mm is None:
        raise RuntimeError("this torch has no grouped matrix product; set model.experts = 'loop'")
    dtype = compute_dtype(x_SD)
    ends = counts_E.cumsum(0).to(torch.int32)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = _grouped_mm(x.to(dtype), weight.to(dtype).transpose(-1, -2), offs=ends)
        return out

    *gate, up = (product(x_SD, weight) for weight in weights[:-1])
    hidden = activate(gate[0] if gate else None, up, kind)
    return product(hidden * scale_S[:, None].to(hidden.dtype), weights[-1])


def experts_loop(x_SD: Tensor, scale_S: Tensor, counts_E: Tensor, weights: list[Tensor], kind: str) -> Tensor:
    """Same as `experts_reference` with hand-written gradients."""
    out: Tensor = _LoopExperts.apply(x_SD, scale_S, counts_E.tolist(), kind, compute_dtype(x_SD), *weights)
    return out


class _LoopExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SD: Tensor, scale_S: Tensor, counts: list[int], kind: str, dtype: torch.dtype, *weights: Tensor
    ) -> Tensor:
        with torch.autocast(x_SD.device.type, enabled=False):
            x_SD, weights = x_SD.to(dtype), tuple(weight.to(dtype) for weight in weights)
            inner = [_products(x_SD, weight, counts) for weight in weights[:-1]]
            hidden_SF = _activate(inner, kind) * scale_S[:, None].to(dtype)
            out_SD = _products(hidden_SF, weights[-1], counts)
        ctx.save_for_backward(x_SD, scale_S, *inner, *weights)
        ctx.counts, ctx.kind, ctx.num_inner = counts, kind, len(inner)
        return out_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_SD, scale_S, *rest = ctx.saved_tensors
        inner, weights, counts = rest[: ctx.num_inner], rest[ctx.num_inner :], ctx.counts
        with torch.autocast(x_SD.device.type, enabled=False):
            grad_out = grads[0].contiguous()
            activated = _activate(inner, ctx.kind)
            scale_S1 = scale_S[:, None].to(activated.dtype)
            grad_hidden = _products(grad_out, weights[-1].transpose(-1, -2), counts)
            grad_scale = torch.linalg.vecdot(grad_hidden, activated)
            grad_down = _weight_gradients(grad_out, activated * scale_S1, counts)
            grad_inner = _activate_backward(grad_hidden.mul_(scale_S1), inner, ctx.kind)
            grad_x = torch.zeros_like(x_SD)
            for grad, weight in zip(grad_inner, weights):
                _add_products(grad_x, grad, weight, counts)
            grad_weights = [_weight_gradients(grad, x_SD, counts) for grad in grad_inner]
        return grad_x, grad_scale.to(scale_S.dtype), None, None, None, *grad_weights, grad_down


def _products(x_SM: Tensor, weight_ENM: Tensor, counts: list[int]) -> Tensor:
    """Each expert's rows times its transposed weight, (S, N)."""
    out = x_SM.new_empty(x_SM.size(0), weight_ENM.size(1))
    for rows, result, weight in zip(x_SM.split(counts), out.split(counts), weight_ENM):
        torch.mm(rows, weight.t(), out=result)
    return out


def _add_products(out_SM: Tensor, grad_SN: Tensor, weight_ENM: Tensor, counts: list[int]) -> None:
    """Add each expert's rows times its weight to `out_SM`."""
    for result, rows, weight in zip(out_SM.split(counts), grad_SN.split(counts), weight_ENM):
        result.addmm_(rows, weight)


def _weight_gradients(grad_SN: Tensor, x_SM: Tensor, counts: list[int]) -> Tensor:
    """(E, N, M): of each expert, the sum of the outer products of its rows."""
    out = x_SM.new_empty(len(counts), grad_SN.size(1), x_SM.size(1))
    for result, grad, x in zip(out, grad_SN.split(counts), x_SM.split(counts)):
        torch.mm(grad.t(), x, out=result)  # zero where an expert has no rows
    return out


def _activate(inner: list[Tensor], kind: str) -> Tensor:
    """Of gate and up, or of up alone."""
    activated = F.silu(inner[0]) if kind == "silu" else F.relu(inner[0]).square_()
    return activated.mul_(inner[1]) if len(inner) == 2 else activated


def _activate_backward(grad: Tensor, inner: list[Tensor], kind: str) -> list[Tensor]:
    """Gradients of `inner` from that of the activation."""

    def through(grad: Tensor) -> Tensor:
        if kind == "silu":
            return torch.ops.aten.silu_backward(grad, inner[0])
        return grad * F.relu(inner[0]).mul_(2)

    if len(inner) == 1:
        return [through(grad)]
    return [through(grad * inner[1]), grad * _activate(inner[:1], kind)]
