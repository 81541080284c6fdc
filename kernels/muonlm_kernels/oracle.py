"""The slow truth beside the iteration."""

from __future__ import annotations

import torch


def polar_factor(grad_KMN: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decomposition, the nearest semi-orthogonal matrix, computed in float64.

    `grad_KMN` is (M, N) or a stack (K, M, N) of any float dtype; the result is float64 of the same shape. Directions
    whose singular value is below the rounding of float64 are left out, so a zero matrix gives zero.
    """
    u, s, vh = torch.linalg.svd(grad_KMN.to(torch.float64), full_matrices=False)
    tolerance = s.amax(dim=-1, keepdim=True) * max(grad_KMN.shape[-2:]) * torch.finfo(torch.float64).eps
    kept = (s > tolerance).to(torch.float64)
    return (u * kept.unsqueeze(-2)) @ vh
