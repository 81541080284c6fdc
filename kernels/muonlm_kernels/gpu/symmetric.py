"""The product C = alpha A B^T + beta D of matrices for which C is known to be symmetric: half the work of a product.

One kernel serves every symmetric product of the Newton-Schulz iterations:

- X X^T: A = B = X
- b A + c A A: A = B = D
- a R + R Z, where R and Z are polynomials of one symmetric matrix, so that they commute and R Z is symmetric

Tiles that lie on or above the diagonal are computed once and written twice, as they are and mirrored. Every element is
written exactly once, also on the diagonal, where only the upper half of a tile is used, so that C equals its transpose
bit by bit even if the rounding of A B^T would not have been symmetric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from muonlm_kernels.gpu.configs import KernelConfig


@triton.jit
def upper_tile(
    program, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Matrix index, first row and first column of a program's tile in the upper triangle of an (M, M) matrix.

    The triangle is one of square super-tiles, `GROUP` tiles wide: programs that run at the same time then share rows
    and columns in the L2 cache. T rows of super-tiles fold into a rectangle that is T + 1 wide, row r of T - r entries
    beside row T - 1 - r of r + 1 entries, which needs integers only. Tiles of a super-tile that lie below the diagonal
    or outside the matrix come out as well: `is_upper` tells them.
    """
    rows_of_group: tl.constexpr = GROUP * (BLOCK_N // BLOCK_M)
    tiles_of_group: tl.constexpr = rows_of_group * GROUP
    groups = tl.cdiv(M, GROUP * BLOCK_N)
    programs = groups * (groups + 1) // 2 * tiles_of_group
    matrix = (program // programs).to(tl.int64)
    program = program % programs
    fold_row = program // tiles_of_group // (groups + 1)
    fold_col = program // tiles_of_group % (groups + 1)
    second = fold_col >= groups - fold_row
    group_row = tl.where(second, groups - 1 - fold_row, fold_row)
    group_col = tl.where(second, fold_col - 1, fold_row + fold_col)
    within = program % tiles_of_group
    row = (group_row * rows_of_group + within // GROUP) * BLOCK_M
    col = (group_col * GROUP + within % GROUP) * BLOCK_N
    return matrix, row, col


@triton.jit
def is_upper(row, col, M, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Whether the tile at (row, col) has an element of the matrix on or above the diagonal."""
    return (row < M) & (col < M) & (row < col + BLOCK_N)


@triton.jit
def store_block(
    c_ptr, tile, row, col, M, stride_cm, stride_cn, PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> None:
    """Writes a tile of an (M, M) matrix: "all", "upper" (with the diagonal) or "lower" (without)."""
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    cols = col + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < M)
    if PART == "upper":
        mask = mask & (rows <= cols)
    if PART == "lower":
        mask = mask & (rows > cols)
    tl.store(c_ptr + rows.to(tl.int64) * stride_cm + cols.to(tl.int64) * stride_cn, tile, mask=mask)


@triton.jit
def store_mirrored(
    c_ptr, tile, row, col, M, stride_cm, stride_cn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> None:
    """Writes a tile of the upper triangle and its mirror image; each element of the matrix once.

    Masks that compare rows with columns make a store scalar, so only tiles on the diagonal have them. Pointers are
    formed inside the branches: formed before, they would all be live at once and spill.
    """
    if row + BLOCK_M <= col:
        store_block(c_ptr, tile, row, col, M, stride_cm, stride_cn, "all", BLOCK_M, BLOCK_N)
        store_block(c_ptr, tl.trans(tile), col, row, M, stride_cm, stride_cn, "all", BLOCK_N, BLOCK_M)
    else:
        store_block(c_ptr, tile, row, col, M, stride_cm, stride_cn, "upper", BLOCK_M, BLOCK_N)
        store_block(c_ptr, tl.trans(tile), col, row, M, stride_cm, stride_cn, "lower", BLOCK_N, BLOCK_M)


@triton.jit
def load_addend(d_ptr, row, col, M, stride_dm, stride_dn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The tile of the addend D at (row, col), in fp32."""
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    pointers = d_ptr + rows.to(tl.int64)[:, None] * stride_dm + cols.to(tl.int64)[None, :] * stride_dn
    return tl.load(pointers, mask=(rows[:, None] < M) & (cols[None, :] < M), other=0.0).to(tl.float32)


@triton.jit
def symmetric_kernel(
    a_ptr,
    b_ptr,
    d_ptr,
    c_ptr,
    M,
    N,
    alpha,
    beta,
    stride_ak,
    stride_am,
    stride_an,
    stride_bk,
    stride_bm,
    stride_bn,
    stride_dk,
    stride_dm,
    stride_dn,
    stride_ck,
    stride_cm,
    stride_cn,
    HAS_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """C = alpha A B^T + beta D, one tile and its mirror image a program. Called by `symmetric`.

    A, B (K, M, N) bf16 or fp16, C, D (K, M, M), any strides in elements; the sum over N is kept in fp32.
    """
    matrix, row, col = upper_tile(tl.program_id(0), M, BLOCK_M, BLOCK_N, GROUP)
    if not is_upper(row, col, M, BLOCK_N):
        return
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    ns = tl.arange(0, BLOCK_K).to(tl.int64)
    advance = tl.full((), BLOCK_K, tl.int64)
    a_ptrs = a_ptr + matrix * stride_ak + rows.to(tl.int64)[:, None] * stride_am + ns[None, :] * stride_an
    b_ptrs = b_ptr + matrix * stride_bk + cols.to(tl.int64)[None, :] * stride_bm + ns[:, None] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, N, BLOCK_K):
        a = tl.load(a_ptrs, mask=(rows[:, None] < M) & (ns[None, :] < N - start), other=0.0)
        b = tl.load(b_ptrs, mask=(cols[None, :] < M) & (ns[:, None] < N - start), other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += advance * stride_an
        b_ptrs += advance * stride_bn
    acc *= alpha
    if HAS_D:
        d_base = d_ptr + matrix * stride_dk
        acc += beta * load_addend(d_base, row, col, M, stride_dm, stride_dn, BLOCK_M, BLOCK_N)
    tile = acc.to(c_ptr.dtype.element_ty)
    store_mirrored(c_ptr + matrix * stride_ck, tile, row, col, M, stride_cm, stride_cn, BLOCK_M, BLOCK_N)


def programs(batch: int, rows: int, config: KernelConfig) -> int:
    """Programs of a launch over `batch` matrices of (rows, rows): the upper triangle in whole super-tiles."""
    group = config.extra["group"]
    groups = triton.cdiv(rows, group * config.block_n)
    return batch * groups * (groups + 1) // 2 * group * group * (config.block_n // config.block_m)


def symmetric(
    a_KMN: torch.Tensor,
    b_KMN: torch.Tensor,
    out_KMM: torch.Tensor,
    config: KernelConfig,
    *,
    addend_KMM: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> torch.Tensor:
    """Writes alpha A B^T + beta D into `out_KMM` and returns it; the caller promises that the result is symmetric.

    A and B (K, M, N) and D (K, M, M) are bf16 or fp16 of any strides and are summed in fp32. Only the upper triangle of
    D counts. `out_KMM` must not overlap the others. `config` has kernel "symmetric" and block_n a multiple of block_m.
    """
    batch, rows, cols = a_KMN.shape
    d_KMM = out_KMM if addend_KMM is None else addend_KMM
    symmetric_kernel[(programs(batch, rows, config),)](
        a_KMN,
        b_KMN,
        d_KMM,
        out_KMM,
        rows,
        cols,
        alpha,
        beta,
        *a_KMN.stride(),
        *b_KMN.stride(),
        *d_KMM.stride(),
        *out_KMM.stride(),
        HAS_D=addend_KMM is not None,
        **config.launch,
    )
    return out_KMM
