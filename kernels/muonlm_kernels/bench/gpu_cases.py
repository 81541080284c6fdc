"""What the GPU report runs: each kernel on given shapes, its float64 truth, and what torch does in its place.

A case launches a kernel with the configuration it is given, so the same case serves for checking and for tuning.
`kernels` is any namespace with the launches of `muonlm_kernels.gpu`: symmetric, update, momentum, stats, scale_cast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from muonlm_kernels.gpu.padding import padded

Size = tuple[int, int, int]
"""(K, M, N): matrices of a stack, rows, columns; M is the shorter side."""

_A, _B, _C = 3.4445, -4.7750, 2.0315
_DECAY, _WEIGHT = 0.95, 0.05


@dataclass(frozen=True)
class Case:
    """One kernel on one input.

    kernel: whose configurations it takes. launch: runs it with one. results: what it computed, given what `launch`
    returned. exact: the same in float64. torch_call: torch's way to the same. flops: of the dense product, 0 for a
    memory-bound kernel. moved: bytes of all operands, each once. reset: undoes what a launch does to its inputs.
    """

    operation: str
    kernel: str
    launch: Callable[[Any], torch.Tensor]
    results: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    exact: Callable[[], Sequence[torch.Tensor]]
    torch_call: Callable[[], object]
    flops: int
    moved: int
    reset: Callable[[], object] = lambda: None

    def error(self, config: Any) -> float:
        """Worst error of an element as a multiple of what is allowed, so 1 is the limit; infinite with NaN.

        Allowed is twice the rounding of the stored result (1e-5 for fp32) times the exact magnitude plus the root mean
        square of the result. That scale holds small elements to the size of their neighbours: next to a large diagonal,
        an error relative to the largest element would hide a lost block.
        """
        self.reset()
        worst = 0.0
        for result, exact in zip(self.results(self.launch(config)), self.exact(), strict=True):
            allowed = max(torch.finfo(result.dtype).eps, 1e-5) * (exact.abs() + exact.square().mean().sqrt())
            errors = (result.to(torch.float64) - exact).abs() / allowed
            worst = max(worst, float(errors.nan_to_num(nan=float("inf")).max()))
        return worst


def products(kernels: Any, size: Size, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """A = X X^T, the polynomial b A + c A A^T, the update a X + b A X as it is, transposed, with rounding carried.

    `size` is padded, as it is wherever products are launched.
    """
    size = padded(*size)
    _, rows, cols = size
    x_KMN = _random(size, device, 0).div_(cols**0.5).to(dtype)
    a_KMM = x_KMN @ x_KMN.mT
    out_KMM = torch.empty_like(a_KMM)
    square, oblong = a_KMM.numel(), x_KMN.numel()

    def poly(config: Any) -> torch.Tensor:
        return kernels.symmetric(a_KMM, a_KMM, out_KMM, config, addend_KMM=a_KMM, alpha=_C, beta=_B)

    def torch_poly(a_KMM: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(a_KMM, a_KMM, a_KMM, beta=_B, alpha=_C)

    return [
        Case(
            operation="xxt",
            kernel="symmetric",
            launch=lambda config: kernels.symmetric(x_KMN, x_KMN, out_KMM, config),
            results=_alone,
            exact=lambda: [x_KMN.double() @ x_KMN.double().mT],
            torch_call=lambda: x_KMN @ x_KMN.mT,
            flops=2 * rows * oblong,
            moved=(oblong + square) * dtype.itemsize,
        ),
        Case(
            operation="poly",
            kernel="symmetric",
            launch=poly,
            results=_alone,
            exact=lambda: [torch_poly(a_KMM.double())],
            torch_call=lambda: torch_poly(a_KMM),
            flops=2 * rows * square,
            moved=2 * square * dtype.itemsize,
        ),
        *_updates(kernels, a_KMM, x_KMN),
    ]


def _updates(kernels: Any, a_KMM: torch.Tensor, x_KMN: torch.Tensor) -> list[Case]:
    out_KMN = torch.empty_like(x_KMN)
    transposed_KMN = torch.empty_like(x_KMN.mT.contiguous()).mT
    # What rounding took away: of the size that it has beside X.
    start_lo_KMN = (x_KMN.float() * 2**-9).to(torch.bfloat16)
    lo_KMN = start_lo_KMN.clone()
    flops = 2 * x_KMN.shape[1] * x_KMN.numel()
    moved = a_KMM.nbytes + 2 * x_KMN.nbytes

    def launch(out: torch.Tensor, **options: Any) -> Callable[[Any], torch.Tensor]:
        return lambda config: kernels.update(a_KMM, x_KMN, out, config, alpha=_B, beta=_A, **options)

    def exact() -> torch.Tensor:
        return torch.baddbmm(x_KMN.double(), a_KMM.double(), x_KMN.double(), beta=_A, alpha=_B)

    def torch_call() -> object:
        return torch.baddbmm(x_KMN, a_KMM, x_KMN, beta=_A, alpha=_B)

    plain, transposed = (
        Case(name, "update", launch(out), _alone, lambda: [exact()], torch_call, flops, moved)
        for name, out in (("update", out_KMN), ("update, transposed", transposed_KMN))
    )
    with_lo = Case(
        operation="update, carried",
        kernel="update_lo",
        launch=launch(out_KMN, lo_KMN=lo_KMN),
        results=lambda result: [result, result.double() + lo_KMN.double()],
        exact=lambda: [exact() + _A * start_lo_KMN.double()] * 2,
        torch_call=torch_call,
        flops=flops,
        moved=moved + 2 * lo_KMN.nbytes,
        reset=lambda: lo_KMN.copy_(start_lo_KMN),
    )
    return [plain, transposed, with_lo]


def memory_bound(kernels: Any, size: Size, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Momentum with the Nesterov update, the norm, and the normalization, from fp32 momentum to iterates of `dtype`."""
    grad_KMN = _random(size, device, 1).to(torch.bfloat16)
    start_KMN = _random(size, device, 2)
    momentum_KMN, out_KMN = start_KMN.clone(), torch.empty(size, dtype=dtype, device=device)
    lo_KMN = torch.empty(size, dtype=torch.bfloat16, device=device)
    norms_K = _norms(start_KMN)
    # What `stats` gives, in one part a matrix.
    partials_K2P = torch.stack([torch.ones_like(norms_K), norms_K.square()], dim=1).unsqueeze(-1)

    def launch_momentum(config: Any) -> torch.Tensor:
        return kernels.momentum(grad_KMN, momentum_KMN, out_KMN, config, beta=_DECAY, weight=_WEIGHT, nesterov=True)

    def exact_momentum() -> list[torch.Tensor]:
        step = _WEIGHT * grad_KMN.double()
        after = _DECAY * start_KMN.double() + step
        return [after, _DECAY * after + step, torch.ones_like(norms_K, dtype=torch.float64)]

    def torch_momentum() -> object:
        momentum_KMN.mul_(_DECAY).add_(grad_KMN, alpha=_WEIGHT)
        update_KMN = momentum_KMN.mul(_DECAY).add_(grad_KMN, alpha=_WEIGHT).to(dtype)
        return update_KMN, _norms(update_KMN)

    def exact_scaled() -> torch.Tensor:
        return start_KMN.double() / norms_K.double()[:, None, None]

    def launch_scaled(config: Any, lo_KMN: torch.Tensor | None = None) -> torch.Tensor:
        kernels.scale_cast(start_KMN, partials_K2P, out_KMN, config, lo_KMN=lo_KMN)
        return out_KMN

    def torch_scaled() -> torch.Tensor:
        return (start_KMN / norms_K[:, None, None]).to(dtype)

    elements = start_KMN.numel()
    return [
        Case(
            operation="momentum",
            kernel="momentum",
            launch=launch_momentum,
            # The norm is that of the update as stored, so it is held against the stored one.
            results=lambda partials: [momentum_KMN, out_KMN, _norm_of(partials) / _norms(out_KMN)],
            exact=exact_momentum,
            torch_call=torch_momentum,
            flops=0,
            moved=(10 + dtype.itemsize) * elements,
            reset=lambda: momentum_KMN.copy_(start_KMN),
        ),
        Case(
            operation="stats",
            kernel="stats",
            launch=lambda config: kernels.stats(start_KMN, config),
            results=lambda partials: [_norm_of(partials)],
            exact=lambda: [_norms(start_KMN.double())],
            torch_call=lambda: _norms(start_KMN),
            flops=0,
            moved=4 * elements,
        ),
        Case(
            operation="scale_cast",
            kernel="scale_cast",
            launch=launch_scaled,
            results=_alone,
            exact=lambda: [exact_scaled()],
            torch_call=torch_scaled,
            flops=0,
            moved=(4 + dtype.itemsize) * elements,
        ),
        Case(
            operation="scale_cast, carried",
            kernel="scale_cast",
            launch=lambda config: launch_scaled(config, lo_KMN),
            results=lambda result: [result, result.double() + lo_KMN.double()],
            exact=lambda: [exact_scaled()] * 2,
            torch_call=torch_scaled,
            flops=0,
            moved=(6 + dtype.itemsize) * elements,
        ),
    ]


def _alone(result: torch.Tensor) -> list[torch.Tensor]:
    return [result]


def _random(size: Size, device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)


def _norms(x_KMN: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x_KMN, dim=(-2, -1), dtype=torch.promote_types(x_KMN.dtype, torch.float32))


def _norm_of(partials_K2P: torch.Tensor) -> torch.Tensor:
    """Frobenius norms (K,) from partial ones: largest magnitudes and sums of squares relative to them."""
    amax_KP, squares_KP = partials_K2P.unbind(dim=1)
    return (squares_KP * amax_KP.square()).sum(dim=-1).sqrt()
