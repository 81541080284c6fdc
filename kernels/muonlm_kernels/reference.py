"""The plain iteration in torch operations: the reference that every faster backend is held against.

It is also the backend for devices that have no other. Shape suffixes: K matrices of a stack, M <= N sides of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from muonlm_kernels.coefficients import Triple


def orthogonalize(
    grad_KMN: torch.Tensor,
    triples: Sequence[Triple],
    dtype: torch.dtype,
    *,
    num_compensated: int = 0,
    preconditioner: Literal["frobenius", "aol"] = "frobenius",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonalize a stack (K, M, N) of any float dtype and strides, with iterates in `dtype`; fastest for M <= N.

    Returns the result in `dtype` and a bool tensor (K,): which matrices were finite. Those that were not, and zero
    matrices, give zeros. The first `num_compensated` steps add the unrounded iterate (see `rounding`), and "aol"
    scales the rows after the division by the norm (see `coefficients`). Nothing waits for the device.
    """
    x_KMN, finite_K = normalize(grad_KMN)
    if preconditioner == "aol":
        x_KMN = scale_rows(x_KMN)
    return iterate(x_KMN, triples, dtype, num_compensated=num_compensated), finite_K


def widened(grad_KMN: torch.Tensor) -> torch.Tensor:
    """The stack in fp32 (fp64 for fp64), contiguous, so that sums are in one order, whatever the strides."""
    return (grad_KMN if grad_KMN.dtype == torch.float64 else grad_KMN.float()).contiguous()


def normalize(grad_KMN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X / ||X||_F in fp32 (fp64 for fp64), and which matrices are finite; zeros where one is zero or not finite.

    Dividing by the largest magnitude first keeps the squares of very small and very large entries in range.
    """
    x_KMN = widened(grad_KMN)
    largest_K11 = x_KMN.abs().amax(dim=(-2, -1), keepdim=True)
    finite_K11 = largest_K11.isfinite()
    x_KMN = torch.where(finite_K11 & (largest_K11 > 0), x_KMN / largest_K11, 0.0)
    norm_K11 = x_KMN.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    return x_KMN / norm_K11.clamp_min(1e-30), finite_K11.flatten()


def scale_rows(x_KMN: torch.Tensor) -> torch.Tensor:
    """Each row divided by the root of its sum over j of |X X^T|_ij, which brings the singular values into [0, 1].

    B. Prach, C. Lampert, "Almost-orthogonal layers for efficient general-purpose Lipschitz networks" (2022). It changes
    the singular vectors too, so the iteration does not converge to the polar factor of the gradient.
    """
    with as_given(x_KMN.device):
        sums_KM1 = (x_KMN @ x_KMN.mT).abs().sum(dim=-1, keepdim=True)
    return x_KMN * sums_KM1.clamp_min(1e-30).rsqrt()


def iterate(
    x_KMN: torch.Tensor, triples: Sequence[Triple], dtype: torch.dtype, *, num_compensated: int = 0
) -> torch.Tensor:
    """The steps alone, on normalized matrices. baddbmm adds in the accumulator: b A + c A A is rounded once."""
    unrounded_KMN, x_KMN = x_KMN, x_KMN.to(dtype)
    with as_given(x_KMN.device):
        for index, (a, b, c) in enumerate(triples):
            gram = x_KMN @ x_KMN.mT
            poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
            if index < num_compensated:
                product_KMN = poly @ x_KMN
                lost_KMN = torch.baddbmm(product_KMN, poly, x_KMN, beta=-1)
                unrounded_KMN = a * unrounded_KMN + product_KMN + lost_KMN
                x_KMN = unrounded_KMN.to(dtype)
            else:
                x_KMN = torch.baddbmm(x_KMN, poly, x_KMN, beta=a)
    return x_KMN


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtype of their operands, also under autocast."""
    kind = device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()
