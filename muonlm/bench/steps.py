"""Times optimizer steps on the ranks of a process group: all contenders in every round, on the same gradients.

A step takes as long as its slowest rank. Every decision (who is left out, how many rounds) follows from figures that
all ranks share. Collectives and bytes are counted in a step of their own, which is not timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from muonlm.bench.costs import exchange_bytes, most_collectives
from muonlm.bench.optimizers import Contender, UnavailableError, contenders
from muonlm.bench.placement import Grid, make_grid, place
from muonlm.bench.wire import WireCounter
from muonlm.bench.zoo import Model
from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.dist.precision import bfloat16_is_fast, matmul_tflops
from muonlm.dist.process import World
from muonlm.model.build import build_model
from muonlm.optim.assign import shared_bytes
from muonlm.optim.muon import Muon
from muonlm.optim.plan import Plan
from muonlm_kernels import matmul_flops
from muonlm_kernels.bench.timing import machine, median_interval

SCHEMA = "muonlm-bench-optimizer/1"
MODEL = "forward and backward"
_VOCAB = 1024
_SEQ_LEN = 256


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Fields:
        layout: how the weights are sharded, a key of `muonlm.bench.placement.LAYOUTS`.
        dtype: of our iterates; None for what is fast on the device.
        rounds, budget_s: at most so many interleaved rounds, and about so many seconds of them.
        longest_step_s: contenders whose step takes longer are left out.
        tokens: of a forward and backward pass on each rank, to put a step into proportion; 0 for none.
    """

    model: Model
    layout: str
    dtype: torch.dtype | None
    bucket_bytes: int
    rounds: int
    budget_s: float
    longest_step_s: float
    tokens: int = 0


def measure(world: World, settings: Settings) -> dict[str, Any]:
    """Seconds, collectives and bytes of all contenders, and what the plan of ours says. All ranks call it.

    Raises UserError where ours takes too long.
    """
    torch.manual_seed(0)
    device, weights = world.device, settings.model.weights
    grid = make_grid(settings.layout, device)
    dtype = settings.dtype or collectives.broadcast_object(
        torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    )
    grads = [param.detach() for param in place(weights, grid, device, seed=1, std=1e-2)]
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    facts: dict[str, Any] = {}
    for contender in contenders(dtype, settings.bucket_bytes):
        _say(world, f"{contender.name} ...")
        row, optimizer = _prepare(contender, settings, grid, grads, device, is_ours=not rows)
        if row["skipped"] and not rows:
            raise UserError(f"{contender.name}: {row['skipped']}; raise --longest-step, or take fewer --parameters")
        rows.append(row)
        if optimizer is not None:
            calls[contender.name] = partial(_take_step, contender, optimizer)
            if isinstance(optimizer, Muon):
                facts = _facts(optimizer.plan(), grid, settings.bucket_bytes)
    if settings.tokens:
        calls[MODEL] = _model_pass(settings, device)
    rounds = _num_rounds(settings, calls, rows, device)
    _say(world, f"{rounds} rounds ...")
    seconds, cpu_seconds = _interleaved(calls, rounds, device)
    _add_figures(rows, seconds, cpu_seconds)
    return {
        "schema": SCHEMA,
        "machine": machine(device),
        "world": {"ranks": world.size, "backend": world.backend, "layout": grid.layout, "replicas": grid.replicas},
        "model": {
            "name": settings.model.name,
            "about": settings.model.about,
            "elements": settings.model.numel,
            "matrices": settings.model.num_matrices,
        },
        "rounds": rounds,
        "plan": facts,
        "contenders": rows,
        "tokens": settings.tokens,
        "model_seconds": statistics.median(seconds[MODEL]) if MODEL in seconds else None,
    }


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, file=sys.stderr, flush=True)


def _take_step(contender: Contender, optimizer: torch.optim.Optimizer) -> None:
    with contender.around_step():
        optimizer.step()


def _prepare(
    contender: Contender,
    settings: Settings,
    grid: Grid,
    grads: Sequence[torch.Tensor],
    device: torch.device,
    *,
    is_ours: bool,
) -> tuple[dict[str, Any], torch.optim.Optimizer | None]:
    """A contender's row without its times, and its optimizer after two steps; None where the row says why not."""
    row: dict[str, Any] = {
        "name": contender.name,
        "iterates": None if contender.iterates is None else str(contender.iterates).removeprefix("torch."),
        "skipped": _too_slow(contender, settings, grid, device),
    }
    if row["skipped"]:
        return row, None
    try:
        params = place(settings.model.weights, grid, device, seed=0, std=0.02)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer = contender.make(params, grid)
        _take_step(contender, optimizer)  # makes groups, compiles
        row |= _counts(contender, optimizer, device)
    except UnavailableError as error:
        row["skipped"] = str(error)
    except Exception as error:  # of any kind, in a stranger's code
        if is_ours:
            raise
        row["skipped"] = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if collectives.any_rank(row["skipped"] is not None):
        row["skipped"] = row["skipped"] or "failed on another rank"
        return row, None
    if row["first_seconds"] > settings.longest_step_s:
        row["skipped"] = f"a step takes {row['first_seconds']:.0f} s"
        return row, None
    return row, optimizer


def _too_slow(contender: Contender, settings: Settings, grid: Grid, device: torch.device) -> str | None:
    """The reason why a step would take too long, by the rate of plain products; the slowest rank's rate counts."""
    if contender.iterates is None:
        return None
    flops = sum(w.experts * matmul_flops(w.out_features, w.in_features) for w in settings.model.weights)
    rate = torch.tensor(1e12 * matmul_tflops(contender.iterates, device), dtype=torch.float64, device=device)
    flops_per_s = collectives.all_reduce(rate, "min").item()
    expected = flops * contender.share(grid) / max(flops_per_s, 1.0)
    if expected <= settings.longest_step_s:
        return None
    name = str(contender.iterates).removeprefix("torch.")
    return f"a step would take {expected:.0f} s or more: {name} products run at {flops_per_s / 1e9:.1f} GFLOP/s here"


def _counts(contender: Contender, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """Collectives and bytes of one step, by the process groups' own record; and about how long it took."""
    collectives.reset_counters()
    counter = WireCounter()

    def step() -> None:
        # A function that insists on being compiled would refuse to be watched.
        with torch.compiler.set_stance("force_eager"), counter:
            _take_step(contender, optimizer)

    seconds, _ = _timed(device, step)
    sent = torch.tensor([counter.bytes], dtype=torch.float64, device=device)
    return {
        "first_seconds": seconds,
        "collectives": counter.calls,
        "bytes_mean": collectives.all_reduce(sent.clone()).item() / collectives.world_size(),
        "bytes_max": collectives.all_reduce(sent, "max").item(),
        "by_kind": {kind: {"calls": c["calls"], "bytes": c["bytes"]} for kind, c in counter.counts.items()},
    }


def _interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and CPU seconds of each call in each round; the order rotates."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = _timed(device, calls[name])
            seconds[name].append(wall)
            cpu_seconds[name].append(cpu)
    return seconds, cpu_seconds


def _timed(device: torch.device, step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a step on the slowest rank, and CPU seconds of all threads of all ranks.

    One barrier before, one maximum and one sum after it.
    """
    collectives.barrier()
    begin, begin_cpu = _now(device), time.process_time()
    step()
    taken, cpu = _now(device) - begin, time.process_time() - begin_cpu
    wall = collectives.all_reduce(torch.tensor(taken, dtype=torch.float64, device=device), "max")
    total = collectives.all_reduce(torch.tensor(cpu, dtype=torch.float64, device=device))
    return float(wall), float(total)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _num_rounds(
    settings: Settings, calls: Mapping[str, object], rows: Sequence[Mapping[str, Any]], device: torch.device
) -> int:
    """As many rounds as fit the budget by the first steps, at least 3 but no more than wanted."""
    once = sum(row["first_seconds"] for row in rows if row["name"] in calls)
    return min(settings.rounds, max(3, int(settings.budget_s / max(once, 1e-6))))


def _add_figures(
    rows: Sequence[dict[str, Any]], seconds: Mapping[str, list[float]], cpu_seconds: Mapping[str, list[float]]
) -> None:
    """Medians with intervals, and the ratio to ours within rounds."""
    own = seconds[rows[0]["name"]]
    for row in rows:
        if (values := seconds.get(row["name"])) is None:
            continue
        low, high, coverage = median_interval(values)
        ratios = [value / ours for value, ours in zip(values, own, strict=True)]
        row |= {
            "seconds": statistics.median(values),
            "interval": [low, high],
            "coverage": coverage,
            "seconds_of_rounds": values,
            "cpu_seconds": statistics.median(cpu_seconds[row["name"]]),
            "times_ours": statistics.median(ratios),
            "times_ours_interval": list(median_interval(ratios)[:2]),
        }


def _facts(plan: Plan, grid: Grid, bucket_bytes: int) -> dict[str, Any]:
    """What the plan and the formulas say of a step of ours."""
    travelling = shared = total = 0.0
    for piece, workers in zip(plan.pieces, plan.assignment.workers, strict=True):
        numel = piece.rows * piece.cols
        total += numel
        if plan.layouts[piece.param].holders_of(piece.bounds) != list(workers):
            travelling += numel
        if len(workers) > 1:
            shared += len(workers) * shared_bytes(piece.rows, piece.cols, len(workers), plan.steps) / plan.num_ranks
    most = most_collectives(total * plan.element_bytes, bucket_bytes)
    return {
        "formula_bytes": shared
        + exchange_bytes(int(travelling), plan.element_bytes, shards=grid.shards, replicas=grid.replicas),
        "element_bytes": plan.element_bytes,
        "imbalance": plan.assignment.imbalance,
        "shared_matrices": sum(len(workers) > 1 for workers in plan.assignment.workers),
        "rounds": plan.num_rounds,
        "most_collectives": most,
    }


def _model_pass(settings: Settings, device: torch.device) -> Callable[[], object]:
    """A forward and backward pass of a model of the same shapes, on this rank alone."""
    assert settings.model.config is not None
    model: nn.Module = build_model(settings.model.config, _VOCAB, seed=0).to(device)
    length = min(_SEQ_LEN, settings.tokens)
    ids = torch.randint(_VOCAB, (max(1, settings.tokens // length), length), device=device)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, ids).backward()

    run()
    return run
