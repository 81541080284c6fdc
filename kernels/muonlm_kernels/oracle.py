"""The slow truth beside the iteration: the exact polar factor, and how far an estimate is from it.

All measures compute in float64. m is the shorter side of a matrix.
"""

from __future__ import annotations

import torch


def polar_factor(grad_KMN: torch.Tensor, *, rank: int | None = None) -> torch.Tensor:
    """U V^T of the singular value decomposition, the nearest semi-orthogonal matrix, computed in float64.

    `grad_KMN` is (M, N) or a stack (K, M, N) of any float dtype; the result is float64 of the same shape. Directions
    whose singular value is below the rounding of float64 are left out, so a zero matrix gives zero. `rank` keeps only
    that many, for a matrix that was rounded after it was made with this rank.
    """
    u, s, vh = torch.linalg.svd(grad_KMN.to(torch.float64), full_matrices=False)
    tolerance = s.amax(dim=-1, keepdim=True) * max(grad_KMN.shape[-2:]) * torch.finfo(torch.float64).eps
    kept = s > tolerance
    if rank is not None:
        kept[..., rank:] = False
    return (u * kept.to(torch.float64).unsqueeze(-2)) @ vh


def relative_error(estimate: torch.Tensor, exact: torch.Tensor) -> float:
    """||estimate - exact||_F / ||exact||_F; `exact` is not zero."""
    exact = exact.to(torch.float64)
    return float((estimate.to(torch.float64) - exact).norm() / exact.norm())


def orthogonality_error(estimate_MN: torch.Tensor) -> float:
    """||O O^T - I||_F / sqrt(m) over the shorter side: 0 for a semi-orthogonal matrix, 1 for a zero matrix."""
    o = estimate_MN.to(torch.float64)
    o = o if o.shape[0] <= o.shape[1] else o.mT
    return float((o @ o.mT - torch.eye(len(o), dtype=torch.float64, device=o.device)).norm() / len(o) ** 0.5)


def singular_value_range(
    estimate_MN: torch.Tensor, grad_MN: torch.Tensor, *, rank: int | None = None
) -> tuple[float, float, float]:
    """Smallest, median and largest singular value of the estimate over the directions that the input has.

    That is of U^T O V, where U and V span the column and the row space of `grad_MN`: the first `rank` singular
    vectors, or without `rank` those above the rounding of its dtype.
    """
    u_MR, v_NR = _spaces(grad_MN, rank)
    s = torch.linalg.svdvals(u_MR.mT @ estimate_MN.to(torch.float64) @ v_NR)
    return float(s.min()), float(s.median()), float(s.max())


def noise_leak(estimate_MN: torch.Tensor, grad_MN: torch.Tensor, *, rank: int | None = None) -> float:
    """Share of the estimate's energy outside the row and column space of the input: 1 - ||U^T O V||_F^2 / ||O||_F^2.

    U, V and `rank` as in `singular_value_range`. 0 for the exact polar factor; the estimate is not zero.
    """
    u_MR, v_NR = _spaces(grad_MN, rank)
    o = estimate_MN.to(torch.float64)
    return float(1 - (u_MR.mT @ o @ v_NR).square().sum() / o.square().sum())


def _spaces(grad_MN: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the column and the row space."""
    u, s, vh = torch.linalg.svd(grad_MN.to(torch.float64), full_matrices=False)
    if rank is None:
        rank = int((s > s[0] * max(grad_MN.shape) * torch.finfo(grad_MN.dtype).eps).sum())
    return u[:, :rank], vh[:rank].mT
