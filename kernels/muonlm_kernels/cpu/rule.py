"""Which form of the computation a shape gets: a rule made from measurements, a pure function of shape and processor."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from muonlm_kernels.coefficients import Triple
from muonlm_kernels.rounding import tolerates_pairs

# Up to here one batched product is faster than a loop of single ones.
_STACK_MAX_M = 128
# Two steps that share a Gram matrix save 4 m^2 n and cost 6 m^3; measured, they pay from here on.
_PAIR_MIN_ASPECT = 2.0
# From here on it pays to compute the upper blocks of a symmetric product and to copy the others (1.2 to 1.3 times as
# fast), where products are slow against copies: not with AMX.
_SYMMETRIC_MIN_M = 512
_SYMMETRIC_BLOCKS = 4


@dataclass(frozen=True)
class Rule:
    """How matrices of one shape are computed.

    Fields:
        stacked: one batched product for all matrices, instead of a loop.
        groups: how many steps share one X X^T, in order; their sum is the number of steps.
        blocks: block rows of a symmetric product, of which only the upper blocks are computed; 1 computes all.
    """

    stacked: bool
    groups: tuple[int, ...]
    blocks: int


@lru_cache(maxsize=1024)
def rule(m: int, n: int, triples: tuple[Triple, ...], dtype: torch.dtype, *, num_compensated: int = 0) -> Rule:
    """The rule for matrices of sides m <= n, from measurements on processors with and without AMX.

    The first `num_compensated` steps stay alone.
    """
    steps = len(triples) - num_compensated
    if m <= _STACK_MAX_M:
        return Rule(stacked=True, groups=(1,) * len(triples), blocks=1)
    is_exact = torch.finfo(dtype).eps < 1e-6
    group = 2 if n >= _PAIR_MIN_ASPECT * m and (is_exact or tolerates_pairs(triples)) else 1
    groups = (1,) * num_compensated + (group,) * (steps // group) + (1,) * (steps % group)
    products_are_slow = dtype != torch.bfloat16 or not _has_amx()
    blocks = _SYMMETRIC_BLOCKS if products_are_slow and m >= _SYMMETRIC_MIN_M else 1
    return Rule(stacked=False, groups=groups, blocks=blocks)


@cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


@cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it in hardware, else float32. Never float16: it has no fast product."""
    if platform.machine() in ("x86_64", "AMD64"):
        is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        is_fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if is_fast else torch.float32
