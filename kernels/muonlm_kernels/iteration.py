"""Batched Newton-Schulz in plain torch: the reference that every faster backend is held against.

Shape suffixes: K matrices of a stack, M rows, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

from muonlm_kernels.coefficients import coefficients as named_coefficients


@overload
def newton_schulz(
    grad: torch.Tensor, *, coefficients: str = ..., steps: int = ..., dtype: torch.dtype = ...
) -> torch.Tensor: ...


@overload
def newton_schulz(
    grad: Sequence[torch.Tensor], *, coefficients: str = ..., steps: int = ..., dtype: torch.dtype = ...
) -> list[torch.Tensor]: ...


def newton_schulz(
    grad: torch.Tensor | Sequence[torch.Tensor],
    *,
    coefficients: str = "polar_express",
    steps: int = 5,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor | list[torch.Tensor]:
    """Estimate of the orthogonal polar factor U V^T of each matrix.

    `grad` is one matrix (M, N), a stack (K, M, N), or a sequence of matrices of one shape; any strides, any float
    dtype, M, N or K may be 0. The result has the same form, in `dtype`, the precision of the iterates. Each matrix is
    first divided by its largest magnitude and then by its Frobenius norm, both in fp32, so the result does not depend
    on the scale of the input and a zero matrix gives zero. A matrix with NaN or infinity gives NaN: callers check the
    gradient's norm, which they need anyhow. Costs `matmul_flops`.

    Formula: X <- a X + (b A + c A^2) X with A = X X^T over the shorter side (see `coefficients` for the sources).
    """
    if not isinstance(grad, torch.Tensor):
        if not grad:
            return []
        return list(newton_schulz(torch.stack(list(grad)), coefficients=coefficients, steps=steps, dtype=dtype))
    if grad.ndim not in (2, 3):
        raise ValueError(f"newton_schulz takes (M, N) or (K, M, N), got shape {tuple(grad.shape)}")
    triples = named_coefficients(coefficients, steps)
    if grad.numel() == 0:
        return torch.zeros_like(grad, dtype=dtype)
    wide = grad.shape[-2] <= grad.shape[-1]
    x_KMN = _unit_norm(grad if wide else grad.mT, dtype)
    if x_KMN.ndim == 2:
        x_KMN = _iterate(x_KMN, triples)
    else:
        x_KMN = _iterate_stack(x_KMN, triples)
    return x_KMN if wide else x_KMN.mT


def matmul_flops(rows: int, cols: int, steps: int = 5) -> int:
    """FLOPs of the dense iteration on one (rows, cols) matrix: steps * (4 m^2 n + 2 m^3), m the shorter side."""
    m, n = sorted((rows, cols))
    return steps * (4 * m * m * n + 2 * m**3)


def _unit_norm(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """X / ||X||_F. The two-stage division keeps squares of very small and very large entries inside fp32."""
    x = x.float()
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / x.square().sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-30)).to(dtype).contiguous()


def _iterate(x_MN: torch.Tensor, triples: Sequence[tuple[float, float, float]]) -> torch.Tensor:
    """One matrix. addmm adds in the fp32 accumulator, where a separate b*A + c*A@A would round twice."""
    for a, b, c in triples:
        gram = x_MN @ x_MN.mT
        poly = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x_MN = torch.addmm(x_MN, poly, x_MN, beta=a)
    return x_MN


def _iterate_stack(x_KMN: torch.Tensor, triples: Sequence[tuple[float, float, float]]) -> torch.Tensor:
    """A stack of matrices of one shape, as batched products."""
    for a, b, c in triples:
        gram = x_KMN @ x_KMN.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x_KMN = torch.baddbmm(x_KMN, poly, x_KMN, beta=a)
    return x_KMN
