"""The one entry: takes any shape, stride and dtype, and hands the work to the backend of its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, overload

import torch
from torch.utils._triton import has_triton

from muonlm_kernels import reference
from muonlm_kernels.coefficients import COEFFICIENTS, DEFAULT, Triple
from muonlm_kernels.coefficients import coefficients as named_coefficients
from muonlm_kernels.cpu import backend as cpu
from muonlm_kernels.cpu.rule import fast_dtype
from muonlm_kernels.rounding import compensated_steps, tolerates_pairs

# Smaller matrices do not fill the tiles of the Triton kernels.
_TRITON_MIN_M = 128
# Two steps that share one X X^T save 3 m^2 n FLOPs and cost 3 m^3, more launches, and some accuracy.
_PAIR_MIN_ASPECT = 2.0
Matrices = torch.Tensor | Sequence[torch.Tensor]
_NOT_FINITE = "a matrix given to newton_schulz holds NaN or infinity"


@overload
def newton_schulz(
    grad: torch.Tensor,
    *,
    coefficients: str | Sequence[Triple] = ...,
    steps: int | None = ...,
    dtype: torch.dtype | None = ...,
    compensated: bool = ...,
    finite: torch.Tensor | None = ...,
) -> torch.Tensor: ...


@overload
def newton_schulz(
    grad: Sequence[torch.Tensor],
    *,
    coefficients: str | Sequence[Triple] = ...,
    steps: int | None = ...,
    dtype: torch.dtype | None = ...,
    compensated: bool = ...,
    finite: torch.Tensor | None = ...,
) -> list[torch.Tensor]: ...


def newton_schulz(
    grad: torch.Tensor | Sequence[torch.Tensor],
    *,
    coefficients: str | Sequence[Triple] = DEFAULT,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    compensated: bool = False,
    finite: torch.Tensor | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Estimate of the orthogonal polar factor U V^T of each matrix.

    `grad` is one matrix (M, N), a stack (K, M, N), or a list of K matrices (M, N); any strides, any float dtype; K, M
    and N may be 0. The result has the same form; that of a tall matrix may be a transposed view.

    coefficients: the name of a set, or one triple (a, b, c) a step.
    steps: how many steps of a named set; None is the set's own number.
    dtype: precision of iterates and result; None is bfloat16, or float32 on a CPU that does not multiply bfloat16 fast.
    compensated: carry the rounding of the first iterates, for gradients of low rank (see `rounding`).
    finite: a bool tensor, () for one matrix and (K,) otherwise, that is filled with whether each is finite.

    Each matrix is divided by its Frobenius norm first, computed so that the scale of the input does not matter, from
    the smallest to the largest numbers of its dtype. A zero matrix gives zeros, and one with NaN or infinity too, so
    that no weight is lost; it is reported in `finite`. Without `finite` it raises FloatingPointError, on a GPU as an
    assertion of the device at its next synchronization: nothing here waits for the device.

    Formula: X <- a X + (b A + c A^2) X with A = X X^T over the shorter side (see `coefficients` for the sources).
    """
    triples = _triples(coefficients, steps)
    if not isinstance(grad, torch.Tensor):
        _check_list(grad)
    elif grad.ndim not in (2, 3):
        raise ValueError(f"newton_schulz takes (M, N) or (K, M, N), got shape {tuple(grad.shape)}")
    if len(grad) == 0:
        return torch.empty_like(grad, dtype=dtype or grad.dtype) if isinstance(grad, torch.Tensor) else []
    is_one = isinstance(grad, torch.Tensor) and grad.ndim == 2
    matrices = cast("Matrices", [grad] if is_one else grad)
    dtype = _iterate_dtype(matrices[0], dtype)
    is_tall = matrices[0].shape[0] > matrices[0].shape[1]
    result: Matrices
    is_finite: torch.Tensor | list[bool]
    with torch.no_grad():
        wide = _transposed(matrices) if is_tall else matrices
        if isinstance(coefficients, str) and COEFFICIENTS[coefficients].preconditioner == "aol":
            result, is_finite = reference.orthogonalize(_stacked(wide), triples, dtype, preconditioner="aol")
        else:
            num_compensated = compensated_steps(triples, dtype) if compensated else 0
            result, is_finite = _orthogonalize(wide, triples, dtype, num_compensated)
        result = _transposed(result) if is_tall else result
        _report(is_finite, finite)
    if is_one:
        return result[0]
    if not isinstance(grad, torch.Tensor):
        return list(result)
    return result if isinstance(result, torch.Tensor) else result[0][None]


def matmul_flops(rows: int, cols: int, steps: int = 5) -> int:
    """FLOPs of the dense iteration on one (rows, cols) matrix: steps * (4 m^2 n + 2 m^3), m the shorter side."""
    m, n = sorted((rows, cols))
    return steps * (4 * m * m * n + 2 * m**3)


def _triples(coefficients: str | Sequence[Triple], steps: int | None) -> Sequence[Triple]:
    if isinstance(coefficients, str):
        return named_coefficients(coefficients, steps)
    if steps is not None:
        raise ValueError("steps is for a named set; a sequence of triples says itself how many there are")
    if not coefficients or any(len(triple) != 3 for triple in coefficients):
        raise ValueError(f"coefficients is a name or at least one triple (a, b, c), got {coefficients!r}")
    return coefficients


def _check_list(grads: Sequence[torch.Tensor]) -> None:
    kinds = {(tuple(grad.shape), grad.dtype, grad.device) for grad in grads}
    if len(kinds) > 1 or any(len(shape) != 2 for shape, _, _ in kinds):
        raise ValueError(f"a list has matrices (M, N) of one shape, dtype and device, got {sorted(map(str, kinds))}")


def _iterate_dtype(grad: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the iterates; ValueError for what cannot be computed."""
    if not grad.is_floating_point():
        raise ValueError(f"newton_schulz takes floating point matrices, got {grad.dtype}")
    is_cpu = grad.device.type == "cpu"
    if dtype is None:
        return fast_dtype() if is_cpu else torch.bfloat16
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"iterates are bfloat16, float16, float32 or float64, got dtype={dtype}")
    if is_cpu and dtype == torch.float16:
        raise ValueError("float16 iterates are for GPUs: CPUs multiply them 5 to 100 times slower than bfloat16")
    return dtype


def _transposed(matrices: Matrices) -> Matrices:
    return matrices.mT if isinstance(matrices, torch.Tensor) else [matrix.mT for matrix in matrices]


def _stacked(matrices: Matrices) -> torch.Tensor:
    return matrices if isinstance(matrices, torch.Tensor) else torch.stack(list(matrices))


def _orthogonalize(
    matrices: Matrices, triples: Sequence[Triple], dtype: torch.dtype, num_compensated: int
) -> tuple[Matrices, torch.Tensor | list[bool]]:
    """The results for matrices (M, N), M <= N, and which of these are finite."""
    (m, n), device = matrices[0].shape, matrices[0].device
    if m == 0:
        return torch.zeros((len(matrices), m, n), dtype=dtype, device=device), [True] * len(matrices)
    if device.type == "cpu":
        # One result is made alone: cutting it out of a stack costs as much as a small product.
        shape = (m, n) if len(matrices) == 1 else (len(matrices), m, n)
        out = torch.empty(shape, dtype=dtype)
        results: Matrices = [out] if len(matrices) == 1 else out
        return results, cpu.orthogonalize(matrices, triples, dtype, results, num_compensated=num_compensated)
    stack_KMN = _stacked(matrices)
    if stack_KMN.is_cuda and m >= _TRITON_MIN_M and dtype in (torch.bfloat16, torch.float16) and has_triton():
        from muonlm_kernels.gpu import backend

        pairs = n >= _PAIR_MIN_ASPECT * m and tolerates_pairs(tuple(triples))
        return backend.orthogonalize(
            stack_KMN,
            triples,
            dtype=dtype,
            method="paired" if pairs else "standard",
            compensated=num_compensated > 0,
        )
    return reference.orthogonalize(stack_KMN, triples, dtype, num_compensated=num_compensated)


def _report(is_finite: torch.Tensor | list[bool], finite: torch.Tensor | None) -> None:
    """Fill the caller's flag, or raise: at once on a CPU, else when the device comes to it."""
    if finite is not None:
        flags = is_finite if isinstance(is_finite, torch.Tensor) else torch.tensor(is_finite)
        finite.copy_(flags.view(finite.shape))
    elif isinstance(is_finite, torch.Tensor):
        torch._assert_async(is_finite.all(), _NOT_FINITE)
    elif not all(is_finite):
        raise FloatingPointError(f"{_NOT_FINITE}: number {is_finite.index(False)}, counted from 0, of {len(is_finite)}")
