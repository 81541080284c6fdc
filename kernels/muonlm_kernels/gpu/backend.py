"""Newton-Schulz orthogonalization and momentum on a GPU, as sequences of kernel launches; nothing here synchronizes.

The steps of an iteration are cut into segments, each of which multiplies X once. Within a segment everything is a
polynomial of the Gram matrix R = X X^T, (m, m) with m the shorter side, so that all products are symmetric:

    Z = b R + c R R,  Q <- a Q + Q Z,  R <- (a I + Z) R (a I + Z)  for each step;  X <- Q X at the end

Segments of one step are the standard iteration X <- a X + (b A + c A A) X; longer ones save products with X and lose
accuracy, because R drifts from X X^T. With S segments in all, T steps cost 3 S m^2 n + (4 T - 3 S) m^3 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch

from muonlm_kernels.coefficients import Triple
from muonlm_kernels.gpu import configs, elementwise
from muonlm_kernels.gpu.padding import padded
from muonlm_kernels.gpu.recorded import Buffers, is_worthwhile, recording
from muonlm_kernels.gpu.symmetric import symmetric
from muonlm_kernels.gpu.tma import symmetric_tma, update_tma
from muonlm_kernels.gpu.update import update
from muonlm_kernels.rounding import compensated_steps

Method = Literal["standard", "paired", "gram"]

# Each step that is not a segment of its own saves 3 m^2 (n - m) FLOPs, positive for every n > m, but replaces a product
# with X by small (m, m) ones: below this ratio of the sides every method runs as the standard one.
LONG_SEGMENT_ASPECT = 1.5


def orthogonalize(
    grad_KMN: torch.Tensor,
    triples: Sequence[Triple],
    *,
    dtype: torch.dtype,
    method: Method = "standard",
    compensated: bool = False,
    restarts: tuple[int, ...] = (2,),
    partials_K2P: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Newton-Schulz iteration of a stack (K, M, N): the result (K, M, N) in `dtype` and finite flags (K,) bool.

    Each matrix is divided by its Frobenius norm and then goes through X <- a X + b (X X^T) X + c (X X^T)^2 X for each
    (a, b, c) of `triples`, with iterates in `dtype` (bfloat16 or float16) and sums in fp32. `grad_KMN` has any strides
    and float dtype. A matrix that is zero or not finite gives zero; the flag tells them apart. `partials_K2P` are the
    norms that `momentum_update` returned for this very tensor, which save reading it once.

    method: "standard", segments of one step; "paired", of two; "gram", segments that begin at the iterations
    `restarts`, in float16 only. Stacks with an aspect below `LONG_SEGMENT_ASPECT` take the standard method.

    compensated: segments that begin in one of the first steps, `rounding.compensated_steps`, add what rounding took
    from X, times the product of their a, so that noise does not grow where the matrix has no direction. No FLOPs; one
    more buffer, bfloat16.

    Small stacks are recorded as a CUDA graph at their second call, and replayed (`recorded`). M and N are padded to
    multiples of 16 inside. Costs two buffers like the result (one where the result is wide and
    needs no padding) and two (K, m, m) ones, five for long segments.

    Raises ValueError for another shape, dtype, method or device.
    """
    _check(grad_KMN, triples, dtype, method)
    out_KMN = torch.empty(grad_KMN.shape, dtype=dtype, device=grad_KMN.device)
    if grad_KMN.numel() == 0:
        return out_KMN, torch.ones(grad_KMN.shape[0], dtype=torch.bool, device=grad_KMN.device)
    tall = grad_KMN.shape[1] > grad_KMN.shape[2]
    wide_KMN, wide_out_KMN = (grad_KMN.mT, out_KMN.mT) if tall else (grad_KMN, out_KMN)
    batch, rows, cols = wide_KMN.shape
    segments = segments_of(method if cols >= LONG_SEGMENT_ASPECT * rows else "standard", len(triples), restarts)
    num_compensated = compensated_steps(triples, dtype) if compensated else 0
    carried = [start < num_compensated for start, _ in segments]
    size = padded(batch, rows, cols)
    launch = _Launcher(configs.target_of(grad_KMN.device))

    def allocate(last_KMN: torch.Tensor | None = None) -> Buffers:
        chain = _iterates(out_KMN.new_empty(size) if last_KMN is None else last_KMN, len(segments))
        return Buffers(chain, torch.empty_like(chain[0], dtype=torch.bfloat16) if any(carried) else None)

    def iterate(buffers: Buffers) -> None:
        _iterate(launch, buffers.chain, triples, segments, [buffers.lo_KMN if carry else None for carry in carried])

    with torch.cuda.device_of(grad_KMN):
        recorded = None
        if is_worthwhile(size, grad_KMN.device):
            key = (size, tuple(triples), dtype, tuple(segments), num_compensated, grad_KMN.device)
            recorded = recording(key, allocate, iterate)
        # No form of the last product both carries and transposes.
        is_direct = recorded is None and size == wide_KMN.shape and not (tall and carried[-1])
        buffers = recorded.buffers if recorded is not None else allocate(wide_out_KMN if is_direct else None)
        finite_K = launch.normalize(wide_KMN, partials_K2P, buffers.chain[0], buffers.lo_KMN)
        if recorded is not None:
            recorded.graph.replay()
        else:
            iterate(buffers)
        if not is_direct:
            wide_out_KMN.copy_(buffers.chain[-1][:, :rows, :cols])
    return out_KMN, finite_K


def momentum_update(
    grad_KMN: torch.Tensor,
    momentum_KMN: torch.Tensor,
    *,
    beta: float,
    nesterov: bool,
    ema: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Muon's momentum in one pass: updates `momentum_KMN` in place, returns the update and its partial norms (K, 2, P).

    momentum <- beta momentum + w grad with w = 1 - beta for `ema`, else 1; the update is the momentum, or with
    `nesterov` beta momentum + w grad. Both are computed in fp32; the update is rounded to `out_dtype` and the norms are
    those of the rounded values: give them to `orthogonalize`, or to `frobenius_norms`. Any strides and float dtypes.

    Raises ValueError where the shapes differ or are not (K, M, N).
    """
    if grad_KMN.ndim != 3 or grad_KMN.shape != momentum_KMN.shape:
        raise ValueError(
            f"momentum_update takes a gradient and a momentum of one shape (K, M, N), got {tuple(grad_KMN.shape)} and "
            f"{tuple(momentum_KMN.shape)}; a single matrix needs unsqueeze(0)"
        )
    update_KMN = torch.empty(grad_KMN.shape, dtype=out_dtype, device=grad_KMN.device)
    batch, rows, cols = grad_KMN.shape
    if grad_KMN.numel() == 0:
        return update_KMN, torch.zeros(batch, 2, 1, dtype=torch.float32, device=grad_KMN.device)
    config = configs.pick(configs.target_of(grad_KMN.device), "momentum", batch=batch, rows=rows, cols=cols)
    weight = 1.0 - beta if ema else 1.0
    with torch.cuda.device_of(grad_KMN):
        partials_K2P = elementwise.momentum(
            grad_KMN, momentum_KMN, update_KMN, config, beta=beta, weight=weight, nesterov=nesterov
        )
    return update_KMN, partials_K2P


def frobenius_norms(partials_K2P: torch.Tensor) -> torch.Tensor:
    """Norms (K,) fp32 from partial norms; infinite or NaN where the matrix had a value that is not finite."""
    amax_KP, squares_KP = partials_K2P.unbind(1)
    amax_K1 = amax_KP.amax(dim=1, keepdim=True)
    ratio_KP = amax_KP / amax_K1.clamp_min(torch.finfo(torch.float32).smallest_normal)
    return amax_K1.squeeze(1) * (squares_KP * ratio_KP.square()).sum(dim=1).sqrt()


def segments_of(method: str, steps: int, restarts: tuple[int, ...] = (2,)) -> list[tuple[int, int]]:
    """First and past-the-last step of each segment; restarts that no step follows have no effect."""
    starts = {"standard": range(1, steps), "paired": range(2, steps, 2), "gram": restarts}[method]
    bounds = [0, *sorted({start for start in starts if 0 < start < steps}), steps]
    return list(pairwise(bounds))


def launches(segments: Sequence[tuple[int, int]]) -> int:
    """Kernel launches of an iteration, for any number of matrices: 2 + 4 T - S for T steps in S segments.

    Two for the normalization (one with given norms); X X^T and Q X in each segment; Z in each step; two products for R
    in each step but the last of its segment, and one for Q in each but the first. A standard step with c = 0 has one
    launch less. Segments longer than one step add two small torch operations, which make their first Q = a I + Z.
    """
    steps = segments[-1][1]
    return 2 + 4 * steps - len(segments)


def _check(grad_KMN: torch.Tensor, triples: Sequence[Triple], dtype: torch.dtype, method: str) -> None:
    if grad_KMN.ndim != 3 or not grad_KMN.is_floating_point():
        raise ValueError(
            f"orthogonalize takes a stack (K, M, N) of floating point, got {grad_KMN.dtype} of shape "
            f"{tuple(grad_KMN.shape)}; a single matrix needs unsqueeze(0)"
        )
    if not triples:
        raise ValueError("triples is empty; the iteration needs at least one (a, b, c)")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"the kernels iterate in torch.bfloat16 or torch.float16, not {dtype}; newton_schulz takes any"
        )
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}; known: {', '.join(get_args(Method))}")
    if method == "gram" and dtype is not torch.float16:
        raise ValueError(
            "the Gram method needs torch.float16: with 8 bits of mantissa the Gram matrix drifts from X X^T, and on "
            "spectra with a long tail singular values of 2.8 and more were measured; use method='paired' or 'standard'"
        )


def _iterates(out_KMN: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Where X is before each step and after the last, which is `out_KMN`: two buffers in turn, one of them the result
    itself if it is contiguous. A transposed result is only written to, once, at the end."""
    odd = torch.empty(out_KMN.shape, dtype=out_KMN.dtype, device=out_KMN.device)
    even = out_KMN if out_KMN.is_contiguous() or steps == 1 else torch.empty_like(odd)
    return [(even, odd)[(steps - step) % 2] for step in range(steps)] + [out_KMN]


@dataclass(frozen=True)
class _Launcher:
    """Launches with the configuration shipped for `target` and the shape at hand."""

    target: str

    def normalize(
        self,
        grad_KMN: torch.Tensor,
        partials_K2P: torch.Tensor | None,
        out_KMN: torch.Tensor,
        lo_KMN: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, rows, cols = grad_KMN.shape
        if partials_K2P is None:
            config = configs.pick(self.target, "stats", batch=batch, rows=rows, cols=cols)
            partials_K2P = elementwise.stats(grad_KMN, config)
        config = configs.pick(self.target, "scale_cast", batch=batch, rows=rows, cols=cols)
        return elementwise.scale_cast(grad_KMN, partials_K2P, out_KMN, config, lo_KMN=lo_KMN)

    def symmetric(
        self,
        a_KMN: torch.Tensor,
        b_KMN: torch.Tensor,
        out_KMM: torch.Tensor,
        *,
        addend_KMM: torch.Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> None:
        batch, rows, cols = a_KMN.shape
        config = configs.pick(self.target, "symmetric", batch=batch, rows=rows, cols=cols)
        product = symmetric_tma if config.kernel == "symmetric_tma" else symmetric
        product(a_KMN, b_KMN, out_KMM, config, addend_KMM=addend_KMM, alpha=alpha, beta=beta)

    def update(
        self,
        b_KMM: torch.Tensor,
        x_KMN: torch.Tensor,
        out_KMN: torch.Tensor,
        *,
        alpha: float,
        beta: float,
        lo_KMN: torch.Tensor | None,
        gain: float,
    ) -> None:
        batch, rows, cols = x_KMN.shape
        kernel = "update" if lo_KMN is None else "update_lo"
        config = configs.pick(self.target, kernel, batch=batch, rows=rows, cols=cols)
        product = update_tma if config.kernel == "update_tma" else update
        product(b_KMM, x_KMN, out_KMN, config, alpha=alpha, beta=beta, lo_KMN=lo_KMN, gain=gain)


def _iterate(
    launch: _Launcher,
    chain: list[torch.Tensor],
    triples: Sequence[Triple],
    segments: list[tuple[int, int]],
    carried_KMN: list[torch.Tensor | None],
) -> None:
    """X from chain[0] to chain[-1], one segment after the other; `carried_KMN` is what each adds and writes anew.

    A segment of one step adds a X in fp32. Longer ones use Q X although that rounds Q: with Q = g I + W, where g is the
    product of the a, the terms of g X + W X cancel for large singular values and err more. Either way g lo is what the
    carried rounding amounts to in the null space of R, where it counts.
    """
    batch, rows, _ = chain[0].shape
    count = 2 if len(segments) == len(triples) else 5
    buffers = [chain[0].new_empty(batch, rows, rows) for _ in range(count)]
    r_KMM, z_KMM = buffers[:2]
    for (start, end), x_KMN, next_KMN, lo_KMN in zip(segments, chain[:-1], chain[1:], carried_KMN, strict=True):
        gain = math.prod(a for a, _, _ in triples[start:end])
        _, b, c = triples[start]
        alpha, beta = 1.0, gain
        launch.symmetric(x_KMN, x_KMN, r_KMM)
        if end == start + 1 and c == 0:
            factor_KMM, alpha = r_KMM, b
        else:
            launch.symmetric(r_KMM, r_KMM, z_KMM, addend_KMM=r_KMM, alpha=c, beta=b)
            factor_KMM = z_KMM
        if end > start + 1:
            factor_KMM, beta = _lengthen(launch, triples[start:end], buffers), 0.0
        launch.update(factor_KMM, x_KMN, next_KMN, alpha=alpha, beta=beta, lo_KMN=lo_KMN, gain=gain)


def _lengthen(launch: _Launcher, triples: Sequence[Triple], buffers: list[torch.Tensor]) -> torch.Tensor:
    """Q of a segment longer than one step, given R and Z of its first step in the first two of five buffers."""
    r_KMM, z_KMM, q_KMM, next_q_KMM, t_KMM = buffers
    last_a = triples[0][0]
    q_KMM.copy_(z_KMM).diagonal(dim1=1, dim2=2).add_(last_a)
    for a, b, c in triples[1:]:
        launch.symmetric(r_KMM, z_KMM, t_KMM, addend_KMM=r_KMM, beta=last_a)
        launch.symmetric(t_KMM, z_KMM, r_KMM, addend_KMM=t_KMM, beta=last_a)
        launch.symmetric(r_KMM, r_KMM, z_KMM, addend_KMM=r_KMM, alpha=c, beta=b)
        launch.symmetric(q_KMM, z_KMM, next_q_KMM, addend_KMM=q_KMM, beta=a)
        q_KMM, next_q_KMM, last_a = next_q_KMM, q_KMM, a
    return q_KMM
