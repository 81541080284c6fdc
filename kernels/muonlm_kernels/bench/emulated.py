"""The iteration in emulated precision: matrices are rounded to bfloat16 or float16 and multiplied in float32.

Tensor cores and the bfloat16 units of CPUs compute the same, but for the order of the additions. So the figures do not
depend on the machine, and float16 needs no float16 hardware. Matrices are float32 here, M <= N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from muonlm_kernels.coefficients import Triple


def normalize(x_MN: torch.Tensor, preconditioner: str = "frobenius") -> torch.Tensor:
    """Bring the singular values into (0, 1]: X / ||X||_F, or "aol" (see `CoefficientSet`); over the shorter side."""
    x_MN = x_MN.float() / x_MN.float().norm()
    if preconditioner == "aol":
        x_MN = x_MN * (x_MN @ x_MN.mT).abs().sum(dim=-1, keepdim=True).rsqrt()
    return x_MN


def iterate_standard(
    x_MN: torch.Tensor,
    triples: Sequence[Triple],
    dtype: torch.dtype,
    *,
    separate: bool = False,
    compensated: int = 0,
) -> torch.Tensor:
    """X <- a X + (b A + c A A) X with every stored matrix rounded to `dtype`; float32 in and out, M <= N.

    separate: round each product and each scaled term before they are added, as `b * A + c * A @ A` does; else the sums
    are made in the accumulator. compensated: that many steps add the unrounded X (see `rounding`).
    """
    total = _sum_separately if separate else _sum_at_once
    unrounded, x = x_MN, rounded(x_MN, dtype)
    for index, (a, b, c) in enumerate(triples):
        gram = rounded(x @ x.mT, dtype)
        poly = rounded(total(b, gram, c, gram, gram, dtype), dtype)
        unrounded = total(a, unrounded if index < compensated else x, 1.0, poly, x, dtype)
        x = rounded(unrounded, dtype)
    return x


def iterate_gram(
    x_MN: torch.Tensor,
    triples: Sequence[Triple],
    dtype: torch.dtype,
    restarts: Sequence[int] = (2,),
    *,
    separate: bool = False,
) -> torch.Tensor:
    """The same polynomial on R = X X^T, M x M: Q <- Q (a I + Z), R <- (a I + Z) R (a I + Z), Z = b R + c R R; then Q X.

    Before the steps `restarts` X <- Q X and R <- X X^T, which stops R and Q from drifting apart.
    """
    total = _sum_separately if separate else _sum_at_once
    x = rounded(x_MN, dtype)
    gram = rounded(x @ x.mT, dtype)
    factor = identity = torch.eye(len(x))
    for index, (a, b, c) in enumerate(triples):
        if index in restarts:
            x = rounded(factor @ x, dtype)
            gram, factor = rounded(x @ x.mT, dtype), identity
        z = rounded(total(b, gram, c, gram, gram, dtype), dtype)
        factor = rounded(total(a, factor, 1.0, factor, z, dtype), dtype)
        half = rounded(total(a, gram, 1.0, gram, z, dtype), dtype)
        gram = rounded(total(a, half, 1.0, z, half, dtype), dtype)
    return rounded(factor @ x, dtype)


def _sum_at_once(
    p: float, x: torch.Tensor, q: float, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """p X + q (left right), added in the accumulator; not rounded yet."""
    return p * x + q * (left @ right)


def _sum_separately(
    p: float, x: torch.Tensor, q: float, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """p X + q (left right) of eager code: the product and both terms are rounded before they are added."""
    return rounded(p * x, dtype) + rounded(q * rounded(left @ right, dtype), dtype)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in fp32, rounded to the numbers of `dtype`."""
    return x if dtype == torch.float32 else x.to(dtype).float()
