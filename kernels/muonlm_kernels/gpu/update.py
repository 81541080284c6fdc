"""The last product of a Newton-Schulz step, Y = alpha B X + beta X with symmetric B, in one kernel and one rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from muonlm_kernels.gpu.configs import KernelConfig


@triton.jit
def grouped_tile(
    program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Matrix index, first row and first column of a program's tile of a (K, M, N) result.

    Tiles are taken in bands of `GROUP` rows of tiles, down each column of a band, so that programs that run at the
    same time share both operands in the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    matrix = (program // (tiles_m * tiles_n)).to(tl.int64)
    program = program % (tiles_m * tiles_n)
    band = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    return matrix, (band * GROUP + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def store_update(
    acc,
    x_ptr,
    lo_ptr,
    y_ptr,
    row,
    col,
    M,
    N,
    alpha,
    beta,
    gain,
    stride_xm,
    stride_xn,
    stride_ym,
    stride_yn,
    CARRY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Writes the tile at (row, col): alpha times `acc` plus beta X, and plus gain lo with CARRY.

    CARRY replaces lo, which has the strides of X, by what the rounding of the result takes away.

    One half of the columns after the other: the registers that hold the sum of a large tile leave no room for the
    addends and the result of all of it.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    halves = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    for half in tl.static_range(2):
        cols = col + half * HALF + tl.arange(0, HALF)[None, :]
        inside = (rows < M) & (cols < N)
        x_offset = rows.to(tl.int64) * stride_xm + cols.to(tl.int64) * stride_xn
        y_offset = rows.to(tl.int64) * stride_ym + cols.to(tl.int64) * stride_yn
        exact = alpha * halves[half]
        exact += beta * tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
        if CARRY:
            exact += gain * tl.load(lo_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
        y = exact.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_offset, y, mask=inside)
        if CARRY:
            tl.store(lo_ptr + x_offset, (exact - y.to(tl.float32)).to(lo_ptr.dtype.element_ty), mask=inside)


@triton.jit
def update_kernel(
    b_ptr,
    x_ptr,
    lo_ptr,
    y_ptr,
    M,
    N,
    alpha,
    beta,
    gain,
    stride_bk,
    stride_bm,
    stride_bn,
    stride_xk,
    stride_xm,
    stride_xn,
    stride_yk,
    stride_ym,
    stride_yn,
    CARRY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Y = alpha B X + beta X, one tile a program; CARRY as in `store_update`. Called by `update`.

    B (K, M, M) and X (K, M, N) bf16 or fp16, Y (K, M, N), any strides in elements; the sum over M is kept in fp32.
    """
    matrix, row, col = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    advance = tl.full((), BLOCK_K, tl.int64)
    x_ptr += matrix * stride_xk
    lo_ptr += matrix * stride_xk
    b_ptrs = b_ptr + matrix * stride_bk + rows.to(tl.int64)[:, None] * stride_bm + ks[None, :] * stride_bn
    x_ptrs = x_ptr + cols.to(tl.int64)[None, :] * stride_xn + ks[:, None] * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, M, BLOCK_K):
        b = tl.load(b_ptrs, mask=(rows[:, None] < M) & (ks[None, :] < M - start), other=0.0)
        x = tl.load(x_ptrs, mask=(cols[None, :] < N) & (ks[:, None] < M - start), other=0.0)
        acc = tl.dot(b, x, acc, input_precision="ieee")
        b_ptrs += advance * stride_bn
        x_ptrs += advance * stride_xm
    y_ptr += matrix * stride_yk
    store_update(
        acc,
        x_ptr,
        lo_ptr,
        y_ptr,
        row,
        col,
        M,
        N,
        alpha,
        beta,
        gain,
        stride_xm,
        stride_xn,
        stride_ym,
        stride_yn,
        CARRY,
        BLOCK_M,
        BLOCK_N,
    )


def update(
    b_KMM: torch.Tensor,
    x_KMN: torch.Tensor,
    out_KMN: torch.Tensor,
    config: KernelConfig,
    *,
    alpha: float = 1.0,
    beta: float,
    lo_KMN: torch.Tensor | None = None,
    gain: float | None = None,
) -> torch.Tensor:
    """Writes alpha B X + beta X into `out_KMN` and returns it.

    B (K, M, M) and X (K, M, N) are bf16 or fp16 of any strides and are summed in fp32. `out_KMN` may have any strides,
    the transpose of a tall result for example, and must not overlap the others. `config` has kernel "update".

    `lo_KMN`, of the strides of X, carries what rounding took from an iterate: gain lo is added (None: beta lo), and lo
    becomes what the rounding of this result takes away.
    """
    batch, rows, cols = x_KMN.shape
    assert lo_KMN is None or lo_KMN.stride() == x_KMN.stride()
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n)
    update_kernel[(batch * tiles,)](
        b_KMM,
        x_KMN,
        x_KMN if lo_KMN is None else lo_KMN,
        out_KMN,
        rows,
        cols,
        alpha,
        beta,
        beta if gain is None else gain,
        *b_KMM.stride(),
        *x_KMN.stride(),
        *out_KMN.stride(),
        CARRY=lo_KMN is not None,
        **config.launch,
    )
    return out_KMN
