"""The one entry: takes any shape, stride and dtype, and hands the work to the backend of its device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

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
    and N may be 0. The result has the same form, and may be a view with other strides.

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
    is_aol = isinstance(coefficients, str) and COEFFICIENTS[coefficients].preconditioner == "aol"
    if isinstance(grad, torch.Tensor) and grad.ndim == 2 and grad.device.type == "cpu" and not is_aol:
        grad = grad.detach() if grad.requires_grad else grad
        if finite is not None:
            _check_flag(finite, torch.Size(()), grad.device)
        return _one_on_cpu(grad, triples, _iterate_dtype(grad, dtype), compensated, finite)
    if not isinstance(grad, torch.Tensor):
        _check_list(grad)
        if not grad:
            return []
        stack_KMN = torch.stack(list(grad))
    elif grad.ndim in (2, 3):
        stack_KMN = grad if grad.ndim == 3 else grad[None]
    else:
        raise ValueError(f"newton_schulz takes (M, N) or (K, M, N), got shape {tuple(grad.shape)}")
    stack_KMN = stack_KMN.detach()
    if finite is not None:
        shape = () if isinstance(grad, torch.Tensor) and grad.ndim == 2 else (len(stack_KMN),)
        _check_flag(finite, torch.Size(shape), stack_KMN.device)
    dtype = _iterate_dtype(stack_KMN, dtype)
    is_tall = stack_KMN.shape[1] > stack_KMN.shape[2]
    wide_KMN = stack_KMN.mT if is_tall else stack_KMN
    num_compensated = compensated_steps(triples, dtype) if compensated else 0
    if is_aol and stack_KMN.numel():
        result_KMN, is_finite_K = reference.orthogonalize(wide_KMN, triples, dtype, preconditioner="aol")
    else:
        result_KMN, is_finite_K = _orthogonalize(wide_KMN, triples, dtype, num_compensated)
    if finite is not None:
        finite.copy_(is_finite_K.view(finite.shape))
    elif is_finite_K.device.type != "cpu":
        torch._assert_async(is_finite_K.all(), _NOT_FINITE)
    elif not bool(is_finite_K.all()):
        first = is_finite_K.tolist().index(False)
        raise FloatingPointError(f"{_NOT_FINITE}: number {first}, counted from 0, of {len(is_finite_K)}")
    result_KMN = result_KMN.mT if is_tall else result_KMN
    if not isinstance(grad, torch.Tensor):
        return list(result_KMN)
    return result_KMN if grad.ndim == 3 else result_KMN[0]


def matmul_flops(rows: int, cols: int, steps: int = 5) -> int:
    """FLOPs of the dense iteration on one (rows, cols) matrix: steps * (4 m^2 n + 2 m^3), m the shorter side."""
    m, n = sorted((rows, cols))
    return steps * (4 * m * m * n + 2 * m**3)


def _triples(coefficients: str | Sequence[Triple], steps: int | None) -> tuple[Triple, ...]:
    if isinstance(coefficients, str):
        return named_coefficients(coefficients, steps)
    if steps is not None:
        raise ValueError("steps is for a named set; a sequence of triples says itself how many there are")
    try:
        triples = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError):
        triples = ()
    if not triples or not all(map(math.isfinite, sum(triples, ()))):
        raise ValueError(f"coefficients is a name or at least one triple (a, b, c) of numbers, got {coefficients!r}")
    return triples


def _check_list(grads: Sequence[torch.Tensor]) -> None:
    if not isinstance(grads, Sequence):
        raise ValueError(f"newton_schulz takes a tensor or a list of tensors, got {type(grads).__name__}")
    for index, grad in enumerate(grads):
        if not isinstance(grad, torch.Tensor):
            found = f"{type(grad).__name__} at index {index}"
            raise ValueError(f"newton_schulz takes a tensor or a list of tensors, got {found}")
    kinds = {(tuple(grad.shape), grad.dtype, grad.device) for grad in grads}
    if len(kinds) > 1 or any(len(shape) != 2 for shape, _, _ in kinds):
        raise ValueError(f"a list has matrices (M, N) of one shape, dtype and device, got {sorted(map(str, kinds))}")


def _check_flag(finite: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
    ok = isinstance(finite, torch.Tensor) and finite.dtype == torch.bool and finite.device == device
    if not ok or finite.shape != shape:
        raise ValueError(f"finite is a bool tensor of shape {tuple(shape)} on {device} to be filled, got {finite!r}")


def _iterate_dtype(grad: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the iterates; ValueError for what cannot be computed."""
    if not grad.is_floating_point():
        raise ValueError(f"newton_schulz takes floating point matrices, got {grad.dtype}")
    if grad.layout != torch.strided or hasattr(grad, "full_tensor"):  # sparse, or a DTensor
        kind = f"a {type(grad).__name__} of layout {grad.layout}"
        raise ValueError(f"newton_schulz takes whole, dense matrices, got {kind}; give it to_dense() or full_tensor()")
    is_cpu = grad.device.type == "cpu"
    if dtype is None:
        return fast_dtype() if is_cpu else torch.bfloat16
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"iterates are bfloat16, float16, float32 or float64, got dtype={dtype}")
    if is_cpu and dtype == torch.float16:
        raise ValueError("float16 iterates are for GPUs: CPUs multiply them 5 to 100 times slower than bfloat16")
    return dtype


def _one_on_cpu(
    grad_MN: torch.Tensor,
    triples: tuple[Triple, ...],
    dtype: torch.dtype,
    compensated: bool,
    finite: torch.Tensor | None,
) -> torch.Tensor:
    """The short way: for a small matrix, a few layers of Python cost as much as one of the 15 products."""
    rows, cols = grad_MN.shape
    num_compensated = compensated_steps(triples, dtype) if compensated else 0
    wide_MN = grad_MN.mT if rows > cols else grad_MN
    result_MN, is_finite = cpu.orthogonalize_one(wide_MN, triples, dtype, num_compensated)
    if finite is not None:
        finite.fill_(is_finite)
    elif not is_finite:
        raise FloatingPointError(_NOT_FINITE)
    return result_MN.mT if rows > cols else result_MN


def _orthogonalize(
    stack_KMN: torch.Tensor, triples: tuple[Triple, ...], dtype: torch.dtype, num_compensated: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results for a stack with M <= N, and which of its matrices are finite, (K,)."""
    _, m, n = stack_KMN.shape
    if stack_KMN.numel() == 0:
        is_finite_K = torch.ones(stack_KMN.shape[0], dtype=torch.bool, device=stack_KMN.device)
        return torch.empty_like(stack_KMN, dtype=dtype), is_finite_K
    if stack_KMN.device.type == "cpu":
        return cpu.orthogonalize(stack_KMN, triples, dtype, num_compensated)
    if stack_KMN.is_cuda and m >= _TRITON_MIN_M and dtype in (torch.bfloat16, torch.float16) and has_triton():
        from muonlm_kernels.gpu import backend

        pairs = n >= _PAIR_MIN_ASPECT * m and tolerates_pairs(triples)
        method: Literal["paired", "standard"] = "paired" if pairs else "standard"
        return backend.orthogonalize(stack_KMN, triples, dtype=dtype, method=method, compensated=num_compensated > 0)
    return reference.orthogonalize(stack_KMN, triples, dtype, num_compensated=num_compensated)
