"""What a step sends: how often, how many bytes, in which order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

GPT = [(64, 64)] * 8 + [(192, 64)] * 8 + [(64, 192)] * 4
NUMEL = sum(rows * cols for rows, cols in GPT)
STEPS = 3


def per_step(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {kind: {key: value / STEPS for key, value in c.items()} for kind, c in result["counts"].items()}


@pytest.mark.parametrize("bucket_bytes", [2**16, 2**18, 2**27])
@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (4, "tp"), (4, "fsdp-tp")])
def test_collectives_of_a_step_are_bounded(steps_on, world, layout, bucket_bytes) -> None:
    results = steps_on(world, GPT, layout, steps=STEPS, bucket_bytes=bucket_bytes, dtype=torch.float32)
    for result in results:
        counts = per_step(result)
        calls = counts["all_to_all"]["calls"] + counts["all_reduce"]["calls"]
        assert calls <= 2 * math.ceil(4 * NUMEL / bucket_bytes) + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (4, "fsdp"), (4, "tp"), (4, "fsdp-tp")])
def test_bytes_are_those_of_the_formula(steps_on, world, layout, dtype) -> None:
    """Sharded D ways: (D - 1) / D of a rank's share goes to owners, and as much comes back. Counted, all ranks."""
    results = steps_on(world, GPT, layout, steps=STEPS, dtype=dtype)
    counted = sum(per_step(result)["all_to_all"]["bytes"] for result in results)
    formula = 2 * (world - 1) / world * NUMEL * dtype.itemsize
    assert counted == pytest.approx(formula, rel=0.05)
    plan = results[0]["plan"]
    for rank, result in enumerate(results):
        assert per_step(result)["all_to_all"]["bytes"] == sum(plan.bytes_sent(rank).values())


def test_replicas_spread_the_work_and_fetch_from_their_own_replica(steps_on) -> None:
    """HSDP 2 x 2: each matrix is computed once in the world. Inputs come from the owner's replica alone, and results go
    to all holders: P b / (2 R S) x (gather 1/2 of each matrix; scatter 3/2 of each)."""
    results = steps_on(4, GPT, "hsdp", steps=STEPS, dtype=torch.float32)
    counted = sum(per_step(result)["all_to_all"]["bytes"] for result in results)
    assert counted == pytest.approx((0.5 + 1.5) * NUMEL * 4, rel=0.05)
    assert sum(len(team) for team in results[0]["plan"].assignment.workers) == len(GPT)
    assert results[0]["plan"].assignment.imbalance <= 1.1


def test_expert_stacks_cut_by_expert_send_nothing(steps_on) -> None:
    for result in steps_on(2, [(4, 32, 48), (6, 48, 32)], "cut:0", steps=STEPS):
        assert "all_to_all" not in result["counts"]
    for result in steps_on(4, [(6, 32, 48)], "cut:0", steps=STEPS):
        assert "all_to_all" not in result["counts"]


def test_shared_matrices_reduce_once_a_step_of_the_iteration(steps_on) -> None:
    """Two ranks and one matrix: a maximum, and a Gram matrix of fp32 numbers for each of five steps."""
    for result in steps_on(2, [(64, 128)], "fsdp", steps=STEPS, split_min_flops=0, dtype=torch.float32):
        shared = per_step(result)["shared_all_reduce"]
        assert shared["calls"] == 6
        assert shared["bytes"] == 5 * 4 * 64 * 64 + 4


def test_the_next_bucket_is_on_its_way_while_one_is_computed(run_ranks, monkeypatch) -> None:
    import muonlm.optim.muon as module
    from muonlm.dist import collectives
    from tests.dist.optim.conftest import run_steps

    events: list[str] = []
    start, orthogonalize = collectives.start_all_to_all, module.newton_schulz

    def run(rank: int, size: int, depth: int) -> list[str]:
        monkeypatch.setattr(collectives, "start_all_to_all", lambda *a: events.append("send") or start(*a))
        monkeypatch.setattr(module, "newton_schulz", lambda *a, **k: events.append("compute") or orthogonalize(*a, **k))
        result = run_steps([(64, 64)] * 8, "fsdp", steps=1, dtype=torch.float32, bucket_bytes=2**14, depth=depth)
        assert result["plan"].num_rounds == 4
        return events

    for depth, expected in ((0, "GCSGCSGCSGCS"), (1, "GGCSGCSGCSCS"), (2, "GGGCSGCSCSCS")):
        for seen in run_ranks(lambda rank, size, d=depth: run(rank, size, d), 2):
            kinds = "".join("C" if event == "compute" else "X" for event in seen)
            assert kinds == expected.replace("G", "X").replace("S", "X")
