"""The measurement of `compare`: contenders on shapes, in interleaved rounds, with the error of their results.

A plain matrix product, in the precision that the device multiplies fast, takes part in every round: it gives the rate
that the machine reached at that moment. The share of it that a contender reaches is counted in FLOPs of the dense
iteration, whatever it really computes; what it saves by symmetry or by iterating on the Gram matrix shows as a higher
share.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from muonlm_kernels import matmul_flops, polar_factor
from muonlm_kernels.bench.peers import STEPS, Contender, Missing, automatic_dtype
from muonlm_kernels.bench.timing import LEAST_ROUNDS, Timer, interleaved, machine, median_interval
from muonlm_kernels.oracle import orthogonality_error, relative_error

SCHEMA = "muonlm-kernels-compare/1"

_MATMUL = "a plain matmul"


@dataclass(frozen=True)
class Shape:
    """One matrix, or a stack of them; `stack` None is one matrix without the leading dimension."""

    stack: int | None
    rows: int
    cols: int

    @property
    def size(self) -> tuple[int, ...]:
        """Of the tensor: (M, N) or (K, M, N)."""
        return (self.rows, self.cols) if self.stack is None else (self.stack, self.rows, self.cols)

    @property
    def dense_flops(self) -> int:
        """FLOPs of the dense iteration on all its matrices."""
        return (self.stack or 1) * matmul_flops(self.rows, self.cols, STEPS)

    def __str__(self) -> str:
        return "x".join(map(str, self.size))


@dataclass(frozen=True)
class Plan:
    """How long to measure, and what.

    budget_s: for the rounds of a shape; a contender that cannot make the least number of rounds in it makes one.
    longest_call_s: a contender whose call is expected to take longer is left out.
    exact_up_to: the error against the exact polar factor is computed for matrices whose shorter side is no longer.
    """

    rounds: int
    budget_s: float
    longest_call_s: float
    input_dtype: torch.dtype = torch.float32
    exact_up_to: int = 2048


def compare(
    shapes: Sequence[Shape],
    found: Sequence[Contender],
    missing: Sequence[Missing],
    *,
    plan: Plan,
    device: torch.device,
    timer: Timer,
) -> dict[str, Any]:
    """All contenders on all shapes. Seconds, FLOPs and FLOP/s; a ratio of times below 1 means that ours is faster.

    A contender that is too slow here or fails on a shape has the reason under `skipped` there and no figures. A failure
    of ours is raised.
    """
    rates = {dtype: _matmul_rate(dtype, device, timer) for dtype in {contender.iterates for contender in found}}
    results = []
    for shape in shapes:
        print(f"{shape} ...", file=sys.stderr, flush=True)
        results.append(_measure_shape(shape, found, rates, plan=plan, device=device, timer=timer))
    return {
        "schema": SCHEMA,
        "machine": machine(device),
        "settings": {**asdict(plan), "input_dtype": dtype_name(plan.input_dtype), "steps": STEPS},
        "missing": [asdict(peer) for peer in missing],
        "shapes": results,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _measure_shape(
    shape: Shape,
    found: Sequence[Contender],
    rates: Mapping[torch.dtype, float],
    *,
    plan: Plan,
    device: torch.device,
    timer: Timer,
) -> dict[str, Any]:
    grad = torch.randn(shape.size, generator=torch.Generator().manual_seed(0)).to(device, plan.input_dtype)
    exact = polar_factor(grad) if min(shape.rows, shape.cols) <= plan.exact_up_to else None
    expected = {each.name: shape.dense_flops / rates[each.iterates] for each in found}
    once = {name for name, seconds in expected.items() if seconds * LEAST_ROUNDS > plan.budget_s}
    rows = [
        _prepare(each, grad, exact, expected[each.name], plan, warm_ups=1 if each.name in once else 2) for each in found
    ]
    # Each has a gradient of its own: some peers normalise a bf16 one in place.
    calls = {
        contender.name: partial(contender.orthogonalize, grad.clone())
        for contender, row in zip(found, rows, strict=True)
        if row["skipped"] is None
    }
    size, dtype = _matmul_size(device), automatic_dtype(device)
    calls[_MATMUL] = partial(torch.mm, *torch.randn(2, size, size, device=device).to(dtype))
    seconds = interleaved(calls, timer, rounds=plan.rounds, budget_s=plan.budget_s, once=once)
    rate_of_round = [2 * size**3 / value for value in seconds.pop(_MATMUL)]
    for row in rows:
        if row["name"] in seconds:
            row |= _figures(seconds[row["name"]], rate_of_round, shape.dense_flops)
    return {
        "shape": str(shape),
        "dense_flops": shape.dense_flops,
        "matmul": {"size": size, "dtype": dtype_name(dtype), "flops_per_s": statistics.median(rate_of_round)},
        "rounds": len(rate_of_round),
        "contenders": rows,
        "ratios": [
            _ratio(ours, peer, seconds)
            for ours in found
            for peer in found
            if ours.ours and not peer.ours and peer.name in seconds and ours.name in seconds
        ],
    }


def _prepare(
    contender: Contender,
    grad: torch.Tensor,
    exact: torch.Tensor | None,
    expected_s: float,
    plan: Plan,
    *,
    warm_ups: int,
) -> dict[str, Any]:
    """The row of a contender without its times, after its first calls or with the reason why there are none."""
    row = {
        "name": contender.name,
        "ours": contender.ours,
        "coefficients": contender.coefficients,
        "iterates": dtype_name(contender.iterates),
        "skipped": _too_slow(expected_s, plan.longest_call_s),
    }
    if row["skipped"]:
        return row
    try:
        return row | _warm_up(contender, grad, exact, warm_ups)
    except Exception as error:  # of any kind, in a stranger's code
        if contender.ours:
            raise
        return row | {"skipped": f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def _warm_up(contender: Contender, grad: torch.Tensor, exact: torch.Tensor | None, warm_ups: int) -> dict[str, Any]:
    """The first calls, after the second of which compiled peers are compiled, and the error of the result."""
    for _ in range(warm_ups):
        result = contender.orthogonalize(grad.clone())
    if exact is None:
        return {}
    result_KMN = result if isinstance(result, torch.Tensor) else torch.stack(result)
    result_KMN = result_KMN.to(torch.float64).view(-1, *result_KMN.shape[-2:])
    short = result_KMN if result_KMN.shape[-2] <= result_KMN.shape[-1] else result_KMN.mT
    values = torch.linalg.eigvalsh(short @ short.mT).clamp_min(0).sqrt()
    return {
        "relative_error": relative_error(result_KMN, exact.view_as(result_KMN)),
        "orthogonality_error": statistics.fmean(orthogonality_error(matrix) for matrix in result_KMN),
        "singular_values": [float(values.min()), float(values.median()), float(values.max())],
    }


def _figures(seconds: list[float], rate_of_round: list[float], dense_flops: int) -> dict[str, Any]:
    return {
        "seconds": statistics.median(seconds),
        "seconds_of_rounds": seconds,
        "share_of_matmul_rate": statistics.median(
            dense_flops / value / rate for value, rate in zip(seconds, rate_of_round, strict=False)
        ),
    }


def _ratio(ours: Contender, peer: Contender, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    # Where one of them made a single round, that of the other is compared with it.
    ratios = [a / b for a, b in zip(seconds[ours.name], seconds[peer.name], strict=False)]
    low, high, coverage = median_interval(ratios)
    return {
        "ours": ours.name,
        "peer": peer.name,
        "time_ratio": statistics.median(ratios),
        "interval": [low, high],
        "coverage": coverage,
    }


def _matmul_size(device: torch.device) -> int:
    """Large enough to reach the rate that large products have on the device."""
    return 1024 if device.type == "cpu" else 8192


def _matmul_rate(dtype: torch.dtype, device: torch.device, timer: Timer, size: int = 256) -> float:
    """FLOP/s of one small product, enough to tell arithmetic in hardware from emulation."""
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / timer(partial(torch.mm, left, right))


def _too_slow(expected_s: float, longest_call_s: float) -> str | None:
    if expected_s <= longest_call_s:
        return None
    return f"a call would take about {expected_s:.3g} s; the longest that is measured is {longest_call_s:g} s"
