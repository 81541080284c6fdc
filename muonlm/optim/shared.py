"""Newton-Schulz on a matrix that several ranks share, each with a part of its longer side.

With X = [X_1 ... X_g], M <= N, the Gram matrix X X^T is the sum of the parts' own, so a step is one all_reduce of
M^2 numbers in fp32, and every rank then multiplies its part alone: P X_i with P = a I + b A + c A^2, as A (A X_i) where
that costs less than A^2. FLOPs of a rank and step: 4 m^2 n / g + 2 m^2 min(m, n / g).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from muonlm_kernels import Triple

Reduce = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def orthogonalize_part(
    part_MN: torch.Tensor, triples: Sequence[Triple], dtype: torch.dtype, sum_over_team: Reduce, max_over_team: Reduce
) -> torch.Tensor:
    """This rank's part (M, N / g) of the orthogonalized matrix, M being the matrix's shorter side.

    Iterates have `dtype`, Gram matrices are summed in fp32 (fp64 for fp64 iterates). Collectives over the team: one
    maximum of one number, then for each step one sum of M^2. A zero matrix gives zeros. Every rank of the team gets
    the same Gram matrices, so the parts belong together.
    """
    wide = torch.promote_types(dtype, torch.float32)
    x = part_MN.to(wide)
    largest = max_over_team(x.abs().amax() if x.numel() else x.new_zeros(()))
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    gram = sum_over_team(x @ x.mT)
    norm = gram.diagonal().sum().sqrt()
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    x, gram = (x / norm).to(dtype), gram / norm.square()
    for number, (a, b, c) in enumerate(triples):
        if number:
            gram = sum_over_team(_gram(x, wide))
        A = gram.to(dtype)
        if x.shape[1] < x.shape[0]:
            y = A @ x
            x = torch.add(torch.addmm(b * y, A, y, alpha=c), x, alpha=a)
        else:
            x = torch.addmm(x, torch.addmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x


def _gram(x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """X X^T in fp32, without rounding the sums to 16 bits on the way."""
    if x.is_cuda and x.dtype != wide:
        return torch.mm(x, x.mT, out_dtype=wide)
    wide_x = x.to(wide)
    return wide_x @ wide_x.mT
