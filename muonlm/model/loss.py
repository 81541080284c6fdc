"""Output head and cross-entropy in one function that never holds all logits.

Rows are taken in chunks; of each chunk the logits, their softmax, and at once both gradients are computed, and
only the gradients (the size of the input and of the weight) are kept. The backward pass multiplies them by the
upstream gradient. What lies between the products reads and writes a chunk's logits some ten times; where it is
compiled, twice. Shape suffixes: N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from muonlm.model.flops import loss_chunk_rows
from muonlm.model.layers import compute_dtype, upcast


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap) (arXiv:2408.00118), or the logits where `cap` is None."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def plain_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, cap: float | None = None) -> Tensor:
    """The same value as `linear_cross_entropy`, with all logits at once, and differentiable twice."""
    return F.cross_entropy(upcast(soft_cap(F.linear(x_ND, weight_VD), cap)), labels_N)


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk_rows: int | None = None,
    cap: float | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean of cross_entropy(x @ weight.T, labels) over all rows, as a scalar of at least fp32.

    Products run in autocast's dtype when it is on; logits are rounded to it, as autocast does, and everything
    after them is fp32. The weight's gradient is summed over chunks in at least fp32.

    Args:
        x_ND: hidden states, contiguous rows.
        weight_VD: output embedding (may be tied to the input embedding).
        labels_N: int64 class of each row; every row counts.
        chunk_rows: rows whose logits exist at one time, `flops.loss_chunk_rows` when None.
        cap: bound of the logits, see `soft_cap`.
        compiled: whether torch.compile fuses what is not a matrix product.
    """
    need_x = torch.is_grad_enabled() and x_ND.requires_grad
    need_weight = torch.is_grad_enabled() and weight_VD.requires_grad
    rows = chunk_rows or loss_chunk_rows(weight_VD.size(0), on_gpu=x_ND.is_cuda)
    differentiate = _compiled() if compiled else _differentiate
    loss: Tensor = _LinearCrossEntropy.apply(
        x_ND, weight_VD, labels_N, rows, compute_dtype(x_ND), need_x, need_weight, cap, differentiate
    )
    return loss


Differentiate = Callable[[Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


def _differentiate(logits_NV: Tensor, labels_N1: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Sum of the rows' cross-entropies in at least fp32, and its gradient by the logits in their dtype."""
    capped = soft_cap(upcast(logits_NV), cap)
    p = torch.softmax(capped, -1)
    # log-sum-exp = max logit - log(max probability), and that probability is at least 1/V
    log_sum = capped.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()
    loss = (log_sum - capped.gather(1, labels_N1)).sum()
    grad = p.scatter_add_(1, labels_N1, p.new_full(labels_N1.shape, -1.0))
    if cap is not None:
        grad.addcmul_(grad, capped.square(), value=-1 / cap**2)  # tanh' = 1 - tanh^2
    return loss, grad.to(logits_NV.dtype)


def _fusible(logits_NV: Tensor, labels_N1: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """The same in the form that compiles to two passes: a compiler does not fuse a scatter."""
    capped = soft_cap(upcast(logits_NV), cap)
    log_sum = torch.logsumexp(capped, -1, keepdim=True)
    loss = (log_sum - capped.gather(1, labels_N1)).sum()
    is_label = torch.arange(logits_NV.size(1), device=logits_NV.device) == labels_N1
    grad = torch.exp(capped - log_sum) - is_label.to(capped.dtype)
    if cap is not None:
        grad = grad * (1 - (capped / cap).square())
    return loss, grad.to(logits_NV.dtype)


@cache
def _compiled() -> Differentiate:
    return torch.compile(_fusible)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk_rows: int,
        dtype: torch.dtype,
        need_x: bool,
        need_weight: bool,
        cap: float | None,
        differentiate: Differentiate,
    ) -> Tensor:
        num_rows = x_ND.size(0)
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x_ND.device)
        grad_x = torch.empty_like(x_ND, dtype=dtype) if need_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        with torch.autocast(x_ND.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            for start in range(0, num_rows, chunk_rows):
                x = x_ND[start : start + chunk_rows].to(dtype)
                labels = labels_N[start : start + chunk_rows, None]
                logits = F.linear(x, weight)
                if not (need_x or need_weight):
                    loss += F.cross_entropy(soft_cap(upcast(logits), cap), labels.squeeze(1), reduction="sum")
                    continue
                chunk_loss, grad_logits = differentiate(logits, labels, cap)
                loss += chunk_loss
                if grad_x is not None:
                    torch.mm(grad_logits, weight, out=grad_x[start : start + chunk_rows])
                if grad_weight is not None:
                    grad_weight += grad_logits.t() @ x
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.num_rows, ctx.x_dtype, ctx.weight_dtype = num_rows, x_ND.dtype, weight_VD.dtype
        return loss / num_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        scale = grads[0] / ctx.num_rows
        grad_x = None if grad_x is None else (grad_x * scale).to(ctx.x_dtype)
        grad_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None, None, None, None, None
