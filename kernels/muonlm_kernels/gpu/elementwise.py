"""Memory-bound kernels: momentum, the Frobenius norm, and the normalization that starts the iteration.

Norms are safe over the whole range of fp32, where squares of entries below 1e-19 or above 1e19 are not: each program
keeps the largest magnitude it has seen and the sum of squares relative to it (as LAPACK's lassq), and writes the pair.
A stack's pairs form `partials_K2P`, (K, 2, P) fp32: P largest magnitudes and P sums of squares for each matrix. Which
program reads which tile is fixed and nothing is added atomically, so the results are the same in every run.
A program that meets NaN or infinity writes an infinite magnitude.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from muonlm_kernels.gpu.configs import KernelConfig


@triton.jit
def add_squares(x, amax, squares) -> tuple[tl.tensor, tl.tensor]:
    """The pair (largest magnitude, sum of squares relative to it) with the fp32 tile `x` taken in."""
    magnitude = tl.abs(x)
    # A maximum may ignore NaN; every comparison with it is false.
    magnitude = tl.where(magnitude < float("inf"), magnitude, float("inf"))
    peak = tl.maximum(amax, tl.max(tl.max(magnitude, axis=1), axis=0))
    unit = tl.where(peak > 0.0, peak, 1.0)
    scaled = x / unit
    ratio = amax / unit
    return peak, squares * ratio * ratio + tl.sum(tl.sum(scaled * scaled, axis=1), axis=0)


@triton.jit
def combine_partials(partials_ptr, matrix, parts, MAX_PARTS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The pair (largest magnitude, sum of squares relative to it) of a whole matrix."""
    part = tl.arange(0, MAX_PARTS)
    base = partials_ptr + matrix * 2 * parts
    amaxs = tl.load(base + part, mask=part < parts, other=0.0)
    squares = tl.load(base + parts + part, mask=part < parts, other=0.0)
    amax = tl.max(amaxs, axis=0)
    ratio = amaxs / tl.where(amax > 0.0, amax, 1.0)
    return amax, tl.sum(squares * ratio * ratio, axis=0)


@triton.jit
def stats_kernel(
    x_ptr,
    partials_ptr,
    M,
    N,
    parts,
    stride_xk,
    stride_xm,
    stride_xn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Partial norms of X (K, M, N), any strides and float dtype; `parts` programs a matrix. Called by `stats`."""
    matrix = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    tiles_n = tl.cdiv(N, BLOCK_N)
    amax = 0.0
    squares = 0.0
    for tile in range(part, tl.cdiv(M, BLOCK_M) * tiles_n, parts):
        rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        cols = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        x_ptrs = x_ptr + matrix * stride_xk + rows.to(tl.int64) * stride_xm + cols.to(tl.int64) * stride_xn
        x = tl.load(x_ptrs, mask=(rows < M) & (cols < N), other=0.0).to(tl.float32)
        amax, squares = add_squares(x, amax, squares)
    tl.store(partials_ptr + matrix * 2 * parts + part, amax)
    tl.store(partials_ptr + (matrix * 2 + 1) * parts + part, squares)


@triton.jit
def momentum_kernel(
    grad_ptr,
    momentum_ptr,
    update_ptr,
    partials_ptr,
    M,
    N,
    parts,
    beta,
    weight,
    stride_gk,
    stride_gm,
    stride_gn,
    stride_mk,
    stride_mm,
    stride_mn,
    stride_uk,
    stride_um,
    stride_un,
    NESTEROV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """momentum <- beta momentum + weight grad, the update that follows, and partial norms of it, in one pass.

    The update is the momentum, or with NESTEROV beta momentum + weight grad. Both use the momentum as it is stored, and
    the norms are of the update as it is stored. All (K, M, N), any strides and float dtypes. Called by `momentum`.
    """
    matrix = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    tiles_n = tl.cdiv(N, BLOCK_N)
    amax = 0.0
    squares = 0.0
    for tile in range(part, tl.cdiv(M, BLOCK_M) * tiles_n, parts):
        rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        cols = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        inside = (rows < M) & (cols < N)
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)
        m_ptrs = momentum_ptr + matrix * stride_mk + rows * stride_mm + cols * stride_mn
        g_ptrs = grad_ptr + matrix * stride_gk + rows * stride_gm + cols * stride_gn
        g = weight * tl.load(g_ptrs, mask=inside, other=0.0).to(tl.float32)
        m = beta * tl.load(m_ptrs, mask=inside, other=0.0).to(tl.float32) + g
        stored_m = m.to(momentum_ptr.dtype.element_ty)
        tl.store(m_ptrs, stored_m, mask=inside)
        u = stored_m.to(tl.float32)
        if NESTEROV:
            u = beta * u + g
        stored_u = u.to(update_ptr.dtype.element_ty)
        tl.store(update_ptr + matrix * stride_uk + rows * stride_um + cols * stride_un, stored_u, mask=inside)
        amax, squares = add_squares(stored_u.to(tl.float32), amax, squares)
    tl.store(partials_ptr + matrix * 2 * parts + part, amax)
    tl.store(partials_ptr + (matrix * 2 + 1) * parts + part, squares)


@triton.jit
def scale_cast_kernel(
    x_ptr,
    partials_ptr,
    y_ptr,
    lo_ptr,
    finite_ptr,
    M,
    N,
    PADDED_M,
    PADDED_N,
    parts,
    stride_xk,
    stride_xm,
    stride_xn,
    stride_yk,
    stride_ym,
    stride_yn,
    WRITE_LO: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Y = X / ||X||_F, one tile a program; X (K, M, N), any strides and float dtypes. Called by `scale_cast`.

    Y has PADDED_M rows and PADDED_N columns, zero beyond those of X. A matrix that is zero or not finite gives exact
    zeros, and the first program of each matrix writes its finite flag. WRITE_LO writes what the rounding of Y took away
    to lo, which has the strides of Y.
    """
    tiles_n = tl.cdiv(PADDED_N, BLOCK_N)
    tiles = tl.cdiv(PADDED_M, BLOCK_M) * tiles_n
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    amax, squares = combine_partials(partials_ptr, matrix, parts, MAX_PARTS)
    finite = amax < float("inf")
    usable = finite & (amax > 0.0)
    tl.store(finite_ptr + matrix, finite.to(tl.uint8), mask=tile == 0)
    rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    given = (rows < M) & (cols < N)
    stored = (rows < PADDED_M) & (cols < PADDED_N)
    rows = rows.to(tl.int64)
    cols = cols.to(tl.int64)
    x = tl.load(x_ptr + matrix * stride_xk + rows * stride_xm + cols * stride_xn, mask=given, other=0.0)
    # Two divisors, of which neither can leave the range of fp32 as 1 / ||X|| could.
    y = x.to(tl.float32) / tl.where(usable, amax, 1.0) / tl.sqrt(tl.where(usable, squares, 1.0))
    y = tl.where(usable, y, 0.0)
    stored_y = y.to(y_ptr.dtype.element_ty)
    y_offset = matrix * stride_yk + rows * stride_ym + cols * stride_yn
    tl.store(y_ptr + y_offset, stored_y, mask=stored)
    if WRITE_LO:
        tl.store(lo_ptr + y_offset, (y - stored_y.to(tl.float32)).to(lo_ptr.dtype.element_ty), mask=stored)


def parts_for(rows: int, cols: int, config: KernelConfig) -> int:
    """Programs, and so partial norms, for a matrix: one a tile up to the configuration's `max_parts`."""
    return min(triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n), config.extra["max_parts"])


def stats(x_KMN: torch.Tensor, config: KernelConfig) -> torch.Tensor:
    """Partial norms (K, 2, P) fp32 of a stack of any strides and float dtype, read in fp32. Config kernel "stats"."""
    batch, rows, cols = x_KMN.shape
    parts = parts_for(rows, cols, config)
    partials_K2P = torch.empty(batch, 2, parts, dtype=torch.float32, device=x_KMN.device)
    stats_kernel[(batch * parts,)](
        x_KMN,
        partials_K2P,
        rows,
        cols,
        parts,
        *x_KMN.stride(),
        **config.launch,
    )
    return partials_K2P


def momentum(
    grad_KMN: torch.Tensor,
    momentum_KMN: torch.Tensor,
    update_KMN: torch.Tensor,
    config: KernelConfig,
    *,
    beta: float,
    weight: float,
    nesterov: bool,
) -> torch.Tensor:
    """Updates `momentum_KMN` in place, writes `update_KMN`, and returns the partial norms (K, 2, P) of the latter.

    momentum <- beta momentum + weight grad; see `momentum_kernel`. Config kernel "momentum".
    """
    batch, rows, cols = grad_KMN.shape
    parts = parts_for(rows, cols, config)
    partials_K2P = torch.empty(batch, 2, parts, dtype=torch.float32, device=grad_KMN.device)
    momentum_kernel[(batch * parts,)](
        grad_KMN,
        momentum_KMN,
        update_KMN,
        partials_K2P,
        rows,
        cols,
        parts,
        beta,
        weight,
        *grad_KMN.stride(),
        *momentum_KMN.stride(),
        *update_KMN.stride(),
        NESTEROV=nesterov,
        **config.launch,
    )
    return partials_K2P


def scale_cast(
    x_KMN: torch.Tensor,
    partials_K2P: torch.Tensor,
    out_KMN: torch.Tensor,
    config: KernelConfig,
    *,
    lo_KMN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes X / ||X||_F into `out_KMN` and returns the finite flags (K,) bool. Config kernel "scale_cast".

    The result may have more rows and columns than X, which become zero. Any strides on both sides: with x = tall.mT and
    a contiguous result, the transposition costs no pass of its own. `partials_K2P` has at most the configuration's
    `max_parts` entries a matrix. `lo_KMN`, of the strides of the result, receives what its rounding took away.
    """
    batch, rows, cols = x_KMN.shape
    assert partials_K2P.shape[-1] <= config.extra["max_parts"]
    assert lo_KMN is None or lo_KMN.stride() == out_KMN.stride()
    finite_K = torch.empty(batch, dtype=torch.bool, device=x_KMN.device)
    _, padded_rows, padded_cols = out_KMN.shape
    tiles = triton.cdiv(padded_rows, config.block_m) * triton.cdiv(padded_cols, config.block_n)
    scale_cast_kernel[(batch * tiles,)](
        x_KMN,
        partials_K2P,
        out_KMN,
        out_KMN if lo_KMN is None else lo_KMN,
        finite_K.view(torch.uint8),
        rows,
        cols,
        padded_rows,
        padded_cols,
        partials_K2P.shape[-1],
        *x_KMN.stride(),
        *out_KMN.stride(),
        WRITE_LO=lo_KMN is not None,
        **config.launch,
    )
    return finite_K
