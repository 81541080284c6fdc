"""The products with operands loaded by the Tensor Memory Accelerator of sm_90 and newer, through host descriptors.

A descriptor load takes one instruction for a whole tile, masks the edges in hardware and needs no registers for
pointers, which is what the larger tiles lack. Epilogues are those of the pointer kernels, so that results may have any
strides. Operands must have a last stride of 1 and other strides and addresses in multiples of 16 bytes, as contiguous
stacks of `padding.padded` sizes do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from muonlm_kernels.gpu.symmetric import is_upper, load_addend, programs, store_mirrored, upper_tile
from muonlm_kernels.gpu.update import grouped_tile, store_update

if TYPE_CHECKING:
    from muonlm_kernels.gpu.configs import KernelConfig


@triton.jit
def symmetric_tma_kernel(
    a_desc,
    b_desc,
    d_ptr,
    c_ptr,
    M,
    N,
    alpha,
    beta,
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
    """As `symmetric_kernel`; A and B are descriptors of (K, M, N) with blocks of one matrix."""
    matrix, row, col = upper_tile(tl.program_id(0), M, BLOCK_M, BLOCK_N, GROUP)
    if not is_upper(row, col, M, BLOCK_N):
        return
    index = matrix.to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, N, BLOCK_K):
        a = a_desc.load([index, row, start]).reshape(BLOCK_M, BLOCK_K)
        b = b_desc.load([index, col, start]).reshape(BLOCK_N, BLOCK_K)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    acc *= alpha
    if HAS_D:
        d_base = d_ptr + matrix * stride_dk
        acc += beta * load_addend(d_base, row, col, M, stride_dm, stride_dn, BLOCK_M, BLOCK_N)
    tile = acc.to(c_ptr.dtype.element_ty)
    store_mirrored(c_ptr + matrix * stride_ck, tile, row, col, M, stride_cm, stride_cn, BLOCK_M, BLOCK_N)


@triton.jit
def update_tma_kernel(
    b_desc,
    x_desc,
    x_ptr,
    lo_ptr,
    y_ptr,
    M,
    N,
    alpha,
    beta,
    gain,
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
    """As `update_kernel`; B (K, M, M) and X (K, M, N) are descriptors with blocks of one matrix."""
    matrix, row, col = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    index = matrix.to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, M, BLOCK_K):
        b = b_desc.load([index, row, start]).reshape(BLOCK_M, BLOCK_K)
        x = x_desc.load([index, start, col]).reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(b, x, acc, input_precision="ieee")
    x_ptr += matrix * stride_xk
    lo_ptr += matrix * stride_xk
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


def symmetric_tma(
    a_KMN: torch.Tensor,
    b_KMN: torch.Tensor,
    out_KMM: torch.Tensor,
    config: KernelConfig,
    *,
    addend_KMM: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> torch.Tensor:
    """As `symmetric`, for A and B whose layout a descriptor can hold. `config` has kernel "symmetric_tma"."""
    batch, rows, cols = a_KMN.shape
    d_KMM = out_KMM if addend_KMM is None else addend_KMM
    symmetric_tma_kernel[(programs(batch, rows, config),)](
        TensorDescriptor.from_tensor(a_KMN, [1, config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(b_KMN, [1, config.block_n, config.block_k]),
        d_KMM,
        out_KMM,
        rows,
        cols,
        alpha,
        beta,
        *d_KMM.stride(),
        *out_KMM.stride(),
        HAS_D=addend_KMM is not None,
        **config.launch,
    )
    return out_KMM


def update_tma(
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
    """As `update`, for B and X whose layout a descriptor can hold. `config` has kernel "update_tma"."""
    batch, rows, cols = x_KMN.shape
    assert lo_KMN is None or lo_KMN.stride() == x_KMN.stride()
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n)
    update_tma_kernel[(batch * tiles,)](
        TensorDescriptor.from_tensor(b_KMM, [1, config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(x_KMN, [1, config.block_k, config.block_n]),
        x_KMN,
        x_KMN if lo_KMN is None else lo_KMN,
        out_KMN,
        rows,
        cols,
        alpha,
        beta,
        beta if gain is None else gain,
        *x_KMN.stride(),
        *out_KMN.stride(),
        CARRY=lo_KMN is not None,
        **config.launch,
    )
    return out_KMN
