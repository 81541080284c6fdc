"""FLOPs and predictions: by hand where they are arithmetic, in order where they are assumption; large plans in time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from muonlm.config.schema import TrainConfig
from muonlm.model.flops import flops_per_token
from muonlm.plan.forecast import Forecast, forecast
from muonlm.plan.hardware import DEVICES, Machines
from muonlm.train.peak_flops import peak_flops
from muonlm_kernels import matmul_flops

Make = Callable[..., TrainConfig]
PlanOf = Callable[..., Forecast]


def test_flops_by_hand(make: Make, plan_of: PlanOf) -> None:
    config = make()
    plan = plan_of(config)
    assert plan.flops.model == 8 * 32 * flops_per_token(config.model, 100, 32)
    shapes = [(64, 48), (32, 48), (32, 48), (48, 64), (80, 48), (80, 48), (48, 80)]
    assert plan.flops.newton_schulz == 2 * sum(matmul_flops(*shape) for shape in shapes)
    full = plan_of(make(**{"loop.activation_checkpointing": "full"}))
    head = 6 * 100 * 48 * 8 * 32
    assert full.flops.recomputed == (plan.flops.model - head) / 3
    assert plan.flops.recomputed == 0
    assert plan_of(make(**{"optim.kind": "adamw"})).flops.newton_schulz == 0


def test_time_by_hand(make: Make, plan_of: PlanOf) -> None:
    plan = plan_of(make(**{"optim.kind": "adamw"}), 1, "a100-80gb")
    compute = plan.flops.model / (312e12 * plan.machines.matmul_share)
    passes = 2 * (plan.memory.weights + plan.memory.optimizer_state) + plan.memory.gradients
    assert plan.time.total == pytest.approx(compute + passes / (2.039e12 * plan.machines.link_share))
    assert plan.time.mfu == pytest.approx(plan.flops.model / (312e12 * plan.time.total))
    assert plan.time.muon_share == 0
    assert plan.days == pytest.approx(10 * plan.time.total / 86400)
    assert plan_of(make(), 2, "a100-80gb").rank_hours == pytest.approx(
        2 * 10 * plan_of(make(), 2, "a100-80gb").time.total / 3600
    )


def test_compiled_steps_are_taken_to_be_faster(make: Make, plan_of: PlanOf) -> None:
    eager, compiled = plan_of(make()), plan_of(make(**{"loop.compile": True}))
    assert compiled.time.compute < eager.time.compute
    given = Machines("cpu", DEVICES["cpu"], 8, matmul_share=0.2)
    by_hand = forecast(make(**{"loop.compile": True}), world_size=1, vocab_size=100, machines=given)
    assert by_hand.time.compute == pytest.approx(by_hand.flops.model / (75e9 * 0.2))


def test_muons_share_falls_with_the_batch_and_the_network_matters(make: Make) -> None:
    def plan(per_node: int = 4, gbit: float = 400, **changes: Any) -> Forecast:
        machines = Machines("h100-80gb", replace(DEVICES["h100-80gb"], network_gbit=gbit), per_node)
        wide = {"model.hidden_size": 512, "model.intermediate_size": 2048}
        return forecast(make(zero=3, **wide, **changes), world_size=4, vocab_size=100, machines=machines)

    assert plan(**{"loop.batch_size": 512}).time.muon_share < plan().time.muon_share
    assert plan(per_node=1).time.total > plan(per_node=4).time.total
    assert plan(per_node=1, gbit=10).time.exposed > plan(per_node=1).time.exposed
    assert plan(per_node=4, gbit=10).time.total == plan(per_node=4).time.total
    assert plan(per_node=1, gbit=10).time.mfu < plan(per_node=1).time.mfu


def test_peaks_are_those_of_training() -> None:
    names = {
        "a100-40gb": "NVIDIA A100-SXM4-40GB",
        "a100-80gb": "NVIDIA A100-SXM4-80GB",
        "b200-180gb": "NVIDIA B200",
        "h100-80gb": "NVIDIA H100 80GB HBM3",
        "h200-141gb": "NVIDIA H200",
        "l40s-48gb": "NVIDIA L40S",
        "mi300x-192gb": "AMD Instinct MI300X",
    }
    assert {name: device.peak_flops for name, device in DEVICES.items() if device.kind == "cuda"} == {
        name: peak_flops(text) for name, text in names.items()
    }


HUGE = {
    "kind": "moe",
    "num_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_heads": 64,
    "num_kv_heads": 8,
    "head_dim": 128,
    "num_experts": 384,
    "experts_per_token": 8,
    "expert_size": 2048,
}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "expert"), [(1024, 64), (16384, 64)])
def test_a_trillion_parameters_are_planned_in_seconds(
    make: Make, plan_of: PlanOf, world_size: int, expert: int
) -> None:
    changes = {f"model.{key}": value for key, value in HUGE.items() if key != "kind"}
    loop = {"loop.batch_size": 16384, "loop.activation_checkpointing": "full", "data.seq_len": 4096}
    config = make("moe", zero=3, expert_parallel=expert, **changes, **loop)
    begin = time.process_time()
    plan = plan_of(config, world_size, "h100-80gb", 8, 160_000)
    assert time.process_time() - begin < 10
    assert 1.02e12 < plan.parameters["total"] < 1.04e12
    assert plan.owners.num_matrices == 60 * 3 * 384 + 60 * 3 + 61 * 4 + 3
    assert plan.owners.imbalance < 1.05
    mean = plan.parameters["total"] * 4 / world_size
    assert mean <= plan.memory.weights < 1.1 * mean
    assert math.isfinite(plan.days)
