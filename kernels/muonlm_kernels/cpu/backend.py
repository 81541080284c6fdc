"""Entry of the CPU backend: normalisation, single matrices and stacks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from muonlm_kernels import reference
from muonlm_kernels.coefficients import Triple
from muonlm_kernels.cpu.buffers import Buffers, workspace
from muonlm_kernels.cpu.rule import Rule, rule
from muonlm_kernels.cpu.steps import grouped_steps, plain_steps, symmetric_product

# The same product can differ in the last bit when its matrices begin elsewhere in a cache line. With sides that are
# multiples of this, every matrix of a stack begins at the start of one.
_ALIGNED_SIDE = 8
# Norms whose fourth power, and that of their inverse, stays inside fp32.
_SAFE_NORM = (1e-7, 1e7)


def orthogonalize(
    grad_KMN: torch.Tensor, triples: tuple[Triple, ...], dtype: torch.dtype, num_compensated: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonalize K matrices (M, N), 0 < M <= N, of any strides and float dtype.

    Returns the result (K, M, N) in `dtype` and a bool tensor (K,): which matrices were finite. Those that were not, and
    zero matrices, give zeros. The first `num_compensated` steps add the unrounded iterate (see `rounding`). No result
    depends on the other matrices, to the last bit.
    """
    _, m, n = grad_KMN.shape
    chosen = rule(m, n, triples, dtype, num_compensated=num_compensated)
    if chosen.stacked:
        return _stack(grad_KMN, triples, dtype, num_compensated)
    size = m * n
    padded = -(-size // _ALIGNED_SIDE**2) * _ALIGNED_SIDE**2
    out_KMN = torch.empty((len(grad_KMN), padded), dtype=dtype, device="cpu")[:, :size].view(grad_KMN.shape)
    buffers = workspace.buffers(m, n, dtype)
    pairs = zip(grad_KMN, out_KMN, strict=True)
    is_finite = [_single(*pair, triples, chosen, buffers, num_compensated) for pair in pairs]
    return out_KMN, torch.tensor(is_finite, device="cpu")


def orthogonalize_one(
    grad_MN: torch.Tensor, triples: tuple[Triple, ...], dtype: torch.dtype, num_compensated: int = 0
) -> tuple[torch.Tensor, bool]:
    """As `orthogonalize`, for one matrix (M, N), M <= N; M may be 0."""
    m, n = grad_MN.shape
    chosen = rule(m, n, triples, dtype, num_compensated=num_compensated)
    out_MN = torch.empty((m, n), dtype=dtype, device="cpu")
    if m == 0:
        return out_MN, True
    if not chosen.stacked:
        buffers = workspace.buffers(m, n, dtype)
        return out_MN, _single(grad_MN, out_MN, triples, chosen, buffers, num_compensated)
    out_1MN, is_finite_1 = _stack(grad_MN[None], triples, dtype, num_compensated)
    return out_1MN[0], bool(is_finite_1)


def _single(
    grad_MN: torch.Tensor,
    out_MN: torch.Tensor,
    triples: tuple[Triple, ...],
    chosen: Rule,
    buffers: Buffers,
    num_compensated: int,
) -> bool:
    """One matrix into `out_MN`; False if it is not finite."""
    blocks, (gram, gram_diagonal) = chosen.blocks, buffers.squares[0]
    x, x_t = buffers.x, buffers.x_t
    buffers.clear_gaps()
    _copy(grad_MN, x)
    symmetric_product(x, x_t, gram, blocks)
    norm = _root_of_trace(gram_diagonal)
    if not _SAFE_NORM[0] <= norm <= _SAFE_NORM[1]:
        largest = grad_MN.abs().amax()
        if not 0 < largest < math.inf:
            out_MN.zero_()
            return bool(largest == 0)
        grad_MN = grad_MN / largest
        _copy(grad_MN, x)
        symmetric_product(x, x_t, gram, blocks)
        norm = _root_of_trace(gram_diagonal)
    if chosen.blocks == 1 and not num_compensated and len(chosen.groups) == len(triples):
        plain_steps(buffers, triples, 1 / norm, out_MN)
    else:
        unrounded = grad_MN.float() if num_compensated else None
        grouped_steps(buffers, triples, chosen.groups, blocks, 1 / norm, out_MN, unrounded, num_compensated)
    return True


def _copy(source_MN: torch.Tensor, target_MN: torch.Tensor) -> None:
    """Cast into a buffer. A transposed source is cast as it lies and turned in tiles, which stay in cache."""
    if source_MN.stride(-1) == 1 or source_MN.stride(-2) != 1:
        target_MN.copy_(source_MN)
        return
    tile = 256
    for begin in range(0, source_MN.shape[1], tile):
        piece = source_MN[:, begin : begin + tile].mT.to(target_MN.dtype, memory_format=torch.contiguous_format)
        target_MN[:, begin : begin + tile].copy_(piece.mT.contiguous())


def _root_of_trace(gram_diagonal_M: torch.Tensor) -> float:
    """The Frobenius norm of X, from the diagonal of X X^T; NaN for NaN and infinity."""
    # As Python numbers: between large products, a torch operation that is called once costs more than these.
    trace = sum(gram_diagonal_M.tolist())
    return math.sqrt(trace) if trace >= 0 else math.nan


def _stack(
    grad_KMN: torch.Tensor, triples: Sequence[Triple], dtype: torch.dtype, num_compensated: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All matrices at once, by batched products."""
    grad_KMN = reference.widened(grad_KMN)
    norm_K11 = torch.linalg.vector_norm(grad_KMN, dim=(-2, -1), keepdim=True)
    x_KMN = grad_KMN / norm_K11
    is_finite_K = torch.ones(len(grad_KMN), dtype=torch.bool, device="cpu")
    is_safe_K = ((norm_K11 >= _SAFE_NORM[0]) & (norm_K11 <= _SAFE_NORM[1])).flatten()
    if not bool(is_safe_K.all()):
        unsafe = (~is_safe_K).nonzero().flatten()
        x_KMN[unsafe], is_finite_K[unsafe] = reference.normalize(grad_KMN[unsafe])
    _, m, n = x_KMN.shape
    if m % _ALIGNED_SIDE or n % _ALIGNED_SIDE:
        x_KMN = torch.nn.functional.pad(x_KMN, (0, -n % _ALIGNED_SIDE, 0, -m % _ALIGNED_SIDE))
    x_KMN = reference.iterate(x_KMN, triples, dtype, num_compensated=num_compensated)
    return x_KMN[:, :m, :n].contiguous(), is_finite_K
