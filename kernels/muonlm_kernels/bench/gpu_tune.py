"""Checking and timing of the GPU kernels in all their configurations; `gpu_report` makes a report of it.

Everything comes in through `Rig`: with other launches and another timer the same code runs without a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from muonlm_kernels import coefficients
from muonlm_kernels.bench.gpu_cases import Case, Size, memory_bound, products
from muonlm_kernels.bench.measure import dtype_name
from muonlm_kernels.bench.peers import STEPS, Contender, Missing
from muonlm_kernels.bench.timing import Timer, interleaved, median_interval

if TYPE_CHECKING:
    from muonlm_kernels.gpu.configs import KernelConfig

# Distance of a whole iteration from the same one in float64, relative, in Frobenius norm. Five steps in bf16 end
# 1.2e-2 to 2.4e-2 away on Gaussian matrices, in fp16 eight times nearer.
_ITERATION_LIMITS = {torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Rig:
    """What is measured on what.

    kernels: namespace of the launches. candidates: the configurations of a kernel for a size. pick: the one it gets
    today. methods: this package's iterations; contenders: ours by default and the peers, with those that are missing.
    """

    device: torch.device
    target: str
    kernels: Any
    candidates: Callable[[str, Size], Sequence[KernelConfig]]
    pick: Callable[[str, Size], KernelConfig]
    methods: Sequence[Contender]
    contenders: Sequence[Contender]
    missing: Sequence[Missing]
    timer: Timer


def check_kernels(rig: Rig, size: Size, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row for each kernel and configuration: `ok`, `wrong`, or why it cannot be launched."""
    rows = []
    for case in _cases(rig, size, dtype):
        for name, config in _configs(rig, case, size).items():
            try:
                error, refusal = case.error(config), None
            except Exception as failure:  # too much shared memory, say: another configuration may do
                error, refusal = math.nan, f"cannot launch: {_first_line(failure)}"
            rows.append(_value_row(case.operation, size, dtype, name, error, refusal))
    return rows


def check_methods(rig: Rig, size: Size) -> list[dict[str, Any]]:
    """One row for each of our iterations, wide and tall: its distance from the same iteration in float64."""
    rows = []
    for method in rig.methods:
        for shape in (size, (size[0], size[2], size[1])):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(rig.device)
            exact = _iterate(grad.double(), coefficients(method.coefficients, STEPS))
            result = method.orthogonalize(grad)
            assert isinstance(result, torch.Tensor)
            error = float((result.double() - exact).norm() / exact.norm()) / _ITERATION_LIMITS[method.iterates]
            rows.append(_value_row(method.name, shape, method.iterates, "as shipped", error))
    return rows


def _value_row(
    operation: str, size: Size, dtype: torch.dtype, config: str, error: float, refusal: str | None = None
) -> dict[str, Any]:
    """`error` is a multiple of its limit; an error that is not finite is wrong, and null in the report."""
    return {
        "operation": operation,
        "size": list(size),
        "dtype": dtype_name(dtype),
        "config": config,
        "error_over_limit": error if math.isfinite(error) else None,
        "state": refusal or ("ok" if error <= 1 else "wrong"),
    }


def tune(rig: Rig, size: Size, dtype: torch.dtype, *, rounds: int) -> list[dict[str, Any]]:
    """One row for each kernel on `size`: seconds of torch and of every configuration that can be launched."""
    return [_tune_case(rig, case, size, dtype, rounds) for case in _cases(rig, size, dtype)]


def _tune_case(rig: Rig, case: Case, size: Size, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    configs = _configs(rig, case, size)
    calls = {"torch": case.torch_call}
    for name, config in configs.items():
        try:
            case.launch(config)  # compiles
        except Exception:  # noted by `check_kernels`
            continue
        calls[name] = partial(case.launch, config)
    seconds = interleaved(calls, rig.timer, rounds=rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = {name: value for name, value in medians.items() if name != "torch"}
    best = min(ours, key=ours.__getitem__) if ours else None
    row = {
        "operation": case.operation,
        "kernel": case.kernel,
        "size": list(size),
        "dtype": dtype_name(dtype),
        "dense_flops": case.flops,
        "bytes": case.moved,
        "seconds": medians,
        "seconds_of_rounds": seconds,
        "picked": str(rig.pick(case.kernel, size)),
        "best": best,
    }
    if best is not None:
        ratios = [a / b for a, b in zip(seconds[best], seconds["torch"], strict=True)]
        low, high, coverage = median_interval(ratios)
        row |= {
            "best_config": asdict(configs[best]),
            "time_ratio_to_torch": {"median": statistics.median(ratios), "interval": [low, high], "coverage": coverage},
        }
    return row


def _cases(rig: Rig, size: Size, dtype: torch.dtype) -> list[Case]:
    return [
        *products(rig.kernels, size, rig.device, dtype),
        *memory_bound(rig.kernels, size, rig.device, dtype),
    ]


def _configs(rig: Rig, case: Case, size: Size) -> dict[str, KernelConfig]:
    return {str(config): config for config in (*rig.candidates(case.kernel, size), rig.pick(case.kernel, size))}


def _iterate(x_KMN: torch.Tensor, triples: Sequence[tuple[float, float, float]]) -> torch.Tensor:
    x_KMN = x_KMN / torch.linalg.matrix_norm(x_KMN, keepdim=True)
    for a, b, c in triples:
        gram = x_KMN @ x_KMN.mT
        x_KMN = a * x_KMN + (b * gram + c * gram @ gram) @ x_KMN
    return x_KMN


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
