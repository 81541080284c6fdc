"""Causal grouped-query attention with normalised, rotated queries and keys: implementations of one function.

`attention_sdpa` composes PyTorch operations and ends in `scaled_dot_product_attention`: the form for GPUs, and
the reference for the other. `attention_matmul` is one autograd function of plain matrix products for CPUs,
faster there at short context. It takes rows in blocks, so that most keys after the query are never touched, and
stores the probabilities: O(T^2) bytes. `attention_math` is plain operations throughout, which can be differentiated
twice. Where documents are given, positions attend within their own alone.

Shape suffixes: B sequences, T positions, H query heads, K key heads, G = H/K query heads a key head, A = H + K
heads that are normalised, C head width, P the two halves of C that rotary positions pair up, I = C/2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from muonlm.model.layers import rms_norm, rope_tables, upcast

ROW_BLOCK = 64  # queries whose scores are computed together


Rope = tuple[Tensor, Tensor]


class Heads(NamedTuple):
    """Head counts and constants of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float


def attention_sdpa(
    qkv_BTE: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    heads: Heads,
    document_BT: Tensor | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Same as `attention_matmul` through `scaled_dot_product_attention`."""
    B, T, _ = qkv_BTE.shape
    H, K, C = heads[:3]
    q, k, v = _project(qkv_BTE, q_weight_C, k_weight_C, heads, _fused_norm, rope)
    allowed = None if document_BT is None else _allowed(document_BT)
    out_BHTC = F.scaled_dot_product_attention(
        *(q, k, v), attn_mask=allowed, is_causal=allowed is None, enable_gqa=K != H
    )
    return out_BHTC.transpose(1, 2).reshape(B, T, H * C)


def attention_math(
    qkv_BTE: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    heads: Heads,
    document_BT: Tensor | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Same as `attention_matmul` in operations that can be differentiated twice, with all scores at once."""
    B, T, _ = qkv_BTE.shape
    H, K, C = heads[:3]
    q, k, v = _project(qkv_BTE, q_weight_C, k_weight_C, heads, rms_norm, rope)
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    allowed = _allowed(qkv_BTE.new_zeros(1, T) if document_BT is None else document_BT)
    scores = (upcast(q @ k.transpose(-1, -2)) * C**-0.5).masked_fill(~allowed, float("-inf"))
    out_BHTC = torch.softmax(scores, -1).to(v.dtype) @ v
    return out_BHTC.transpose(1, 2).reshape(B, T, H * C)


def _fused_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = upcast(x)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def _project(
    qkv_BTE: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    heads: Heads,
    norm: Callable[[Tensor, Tensor, float], Tensor],
    rope: Rope | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised and rotated queries (B, H, T, C) and keys (B, K, T, C), and values (B, K, T, C)."""
    B, T, _ = qkv_BTE.shape
    H, K, C, theta, eps = heads
    q, k, v = qkv_BTE.view(B, T, H + 2 * K, C).split((H, K, K), 2)
    cos, sin = rope or rope_tables(T, C, theta, qkv_BTE.device)

    def norm_rope(x: Tensor, weight: Tensor) -> Tensor:
        y = norm(x, weight, eps).transpose(1, 2)
        first, second = y.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    return norm_rope(q, q_weight_C), norm_rope(k, k_weight_C), v.transpose(1, 2)


def _allowed(document_BT: Tensor) -> Tensor:
    """Keys that each query sees, (B, 1, T, T) bool: not after it, and of its document."""
    same = document_BT[:, :, None] == document_BT[:, None, :]
    return same.tril()[:, None]


def attention_matmul(
    qkv_BTE: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    heads: Heads,
    document_BT: Tensor | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Attention of the joint projection.

    Args:
        qkv_BTE: queries, keys and values side by side, E = (H + 2K) * C, in the compute dtype.
        q_weight_C: weight of the per-head RMSNorm of the queries.
        k_weight_C: the same of the keys.
        heads: head counts and constants.
        document_BT: number of the document that each position belongs to; None where all are of one.
        rope: what `layers.rope_tables` returns, which is asked where it is None.

    Returns:
        (B, T, H * C) in the dtype of `qkv_BTE`.
    """
    out: Tensor = _MatmulAttention.apply(qkv_BTE, q_weight_C, k_weight_C, heads, document_BT, rope)
    return out


class _Tables(NamedTuple):
    """Rotary tables and norm weights in fp32."""

    cos_TI: Tensor
    sin_TI: Tensor
    weight: Tensor  # (P, 1, A, 1, I): norm weights by half and head; the queries' carry the scores' 1/sqrt(C)


def _tables(num_positions: int, q_weight_C: Tensor, k_weight_C: Tensor, heads: Heads, rope: Rope | None) -> _Tables:
    H, K, C, theta, _ = heads
    dtype = torch.promote_types(q_weight_C.dtype, torch.float32)
    q, k = (q_weight_C.to(dtype) * C**-0.5).expand(H, C), k_weight_C.to(dtype).expand(K, C)
    weight = torch.cat((q, k)).view(H + K, 2, C // 2).transpose(0, 1)[:, None, :, None]
    cos, sin = rope or rope_tables(num_positions, C, theta, q_weight_C.device)
    return _Tables(cos.to(dtype), sin.to(dtype), weight)


def _halves(x_BATC: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of (B, A, T, C) as (P, B, A, T, I)."""
    B, A, T, C = x_BATC.shape
    x_PBATI = x_BATC.unflatten(-1, (2, C // 2)).permute(3, 0, 1, 2, 4)
    return torch.empty(2, B, A, T, C // 2, dtype=dtype, device=x_BATC.device).copy_(x_PBATI)


def _inverse_rms(x_PBATI: Tensor, eps: float) -> Tensor:
    """1 / rms over both halves, (B, A, T, 1)."""
    square_sum = torch.linalg.vector_norm(x_PBATI, dim=-1, keepdim=True).square_().sum(0)
    return square_sum.div_(2 * x_PBATI.size(-1)).add_(eps).rsqrt_()


def _causal_scores(q: Tensor, k: Tensor, start: int) -> Tensor:
    """Masked scores of the queries from `start` on, (Z, G, rows, start + rows)."""
    Z, G, num_rows, C = q.shape
    scores = torch.bmm(q.reshape(Z, -1, C), k.transpose(1, 2)).view(Z, G, num_rows, -1)
    mask = torch.full((num_rows, num_rows), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    scores[..., start:].add_(mask)
    return scores


def _scores_backward(
    grad_out: Tensor, v: Tensor, q: Tensor, k: Tensor, *probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rotated queries, keys and of values, shaped as these; sums over row blocks are fp32."""
    Z, _, T, C = q.shape
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(upcast(k)), torch.zeros_like(upcast(v))
    for start, p in zip(range(0, T, ROW_BLOCK), probabilities):
        stop = min(start + ROW_BLOCK, T)
        rows, rows_q = (x[:, :, start:stop].reshape(Z, -1, C) for x in (grad_out, q))
        grad_p = torch.bmm(rows, v[:, :stop].transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
        grad_q[:, :, start:stop] = torch.bmm(grad_scores, k[:, :stop]).view(Z, -1, stop - start, C)
        block_k, block_v = torch.bmm(grad_scores.transpose(1, 2), rows_q), torch.bmm(p.transpose(1, 2), rows)
        if stop - start == T:  # one block: nothing to sum
            return grad_q, block_k, block_v
        grad_k[:, :stop] += block_k
        grad_v[:, :stop] += block_v
    return grad_q, grad_k, grad_v


class _MatmulAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTE: Tensor,
        q_weight_C: Tensor,
        k_weight_C: Tensor,
        heads: Heads,
        document_BT: Tensor | None,
        rope: Rope | None,
    ) -> Tensor:
        B, T, _ = qkv_BTE.shape
        H, K, C, _, eps = heads
        with torch.autocast(qkv_BTE.device.type, enabled=False):
            tables = _tables(T, q_weight_C, k_weight_C, heads, rope)
            x_BHTC = qkv_BTE.view(B, T, H + 2 * K, C).transpose(1, 2)
            v = x_BHTC[:, H + K :].reshape(B * K, T, C)
            x = _halves(x_BHTC[:, : H + K], tables.weight.dtype)
            rstd = _inverse_rms(x, eps)
            x.mul_(rstd).mul_(tables.weight)
            roped = torch.empty(B, H + K, T, 2, C // 2, dtype=qkv_BTE.dtype, device=x.device)
            roped[:, :, :, 0] = (x[0] * tables.cos_TI).addcmul_(x[1], tables.sin_TI, value=-1)
            roped[:, :, :, 1] = (x[1] * tables.cos_TI).addcmul_(x[0], tables.sin_TI)
            q = roped[:, :H].reshape(B * K, H // K, T, C)
            k = roped[:, H:].reshape(B * K, T, C)
            out_BTD = qkv_BTE.new_empty(B, T, H * C)
            out = out_BTD.view(B, T, K, H // K, C).permute(0, 2, 3, 1, 4)
            probabilities = []
            for start in range(0, T, ROW_BLOCK):
                stop = min(start + ROW_BLOCK, T)
                scores = _causal_scores(q[:, :, start:stop], k[:, :stop], start)
                if document_BT is not None:
                    others = document_BT[:, start:stop, None] != document_BT[:, None, :stop]
                    scores.unflatten(0, (B, K)).masked_fill_(others[:, None, None], float("-inf"))
                p = torch.softmax(scores, -1).flatten(1, 2)
                out[:, :, :, start:stop] = torch.bmm(p, v[:, :stop]).view(B, K, H // K, -1, C)
                probabilities.append(p)
        ctx.save_for_backward(qkv_BTE, q_weight_C, k_weight_C, rstd, q, k, *probabilities)
        ctx.heads, ctx.rope = heads, rope
        return out_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BTE, q_weight_C, k_weight_C, rstd, *saved = ctx.saved_tensors
        B, T, _ = qkv_BTE.shape
        H, K, C = ctx.heads[:3]
        with torch.autocast(qkv_BTE.device.type, enabled=False):
            tables = _tables(T, q_weight_C, k_weight_C, ctx.heads, ctx.rope)
            x_BHTC = qkv_BTE.view(B, T, H + 2 * K, C).transpose(1, 2)
            grad_out = grads[0].view(B, T, K, H // K, C).permute(0, 2, 3, 1, 4).reshape(B * K, H // K, T, C)
            v = x_BHTC[:, H + K :].reshape(B * K, T, C)
            grad_q, grad_k, grad_v = _scores_backward(grad_out, v, *saved)

            roped = torch.empty(2, B, H + K, T, C // 2, dtype=tables.weight.dtype, device=v.device)
            halves = roped.permute(1, 2, 3, 0, 4)
            halves[:, :H] = grad_q.view(B, H, T, 2, C // 2)
            halves[:, H:] = grad_k.view(B, K, T, 2, C // 2)
            x = _halves(x_BHTC[:, : H + K], tables.weight.dtype)
            grad, grad_weight = _norm_rope_backward(roped, x, rstd, tables)

            grad_qkv = torch.empty_like(qkv_BTE)
            grad_heads = grad_qkv.view(B, T, H + 2 * K, C).transpose(1, 2)
            grad_heads[:, : H + K].unflatten(-1, (2, C // 2)).copy_(grad.permute(1, 2, 3, 0, 4))
            grad_heads[:, H + K :] = grad_v.view(B, K, T, C)
        grad_q_weight = grad_weight[:, :H].sum(1).flatten().mul_(C**-0.5).to(q_weight_C.dtype)
        grad_k_weight = grad_weight[:, H:].sum(1).flatten().to(k_weight_C.dtype)
        return grad_qkv, grad_q_weight, grad_k_weight, None, None, None


def _norm_rope_backward(roped: Tensor, x: Tensor, rstd: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """Gradients of x (P, B, A, T, I) and of the weight (P, A, I) from that of the rotation. Overwrites `roped`."""
    grad = torch.empty_like(roped)
    torch.mul(roped[0], tables.cos_TI, out=grad[0]).addcmul_(roped[1], tables.sin_TI)
    torch.mul(roped[1], tables.cos_TI, out=grad[1]).addcmul_(roped[0], tables.sin_TI, value=-1)
    # RMSNorm: dx = r*w*g - x * r^3/C * sum over C of w*g*x
    product = torch.mul(grad, x, out=roped)
    along_x = (product * tables.weight).sum((0, -1)).unsqueeze(-1)
    along_x.mul_(rstd.pow(3)).div_(-2 * x.size(-1))
    grad.mul_(tables.weight).mul_(rstd).addcmul_(x, along_x)
    return grad, product.mul_(rstd).sum((1, 3))
