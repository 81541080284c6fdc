"""A slow step: what takes its time, and changes that the forecast itself says are faster and fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from muonlm.config.schema import TrainConfig
from muonlm.plan.forecast import Forecast, forecast
from muonlm.plan.hardware import Machines, find_device

Make = Callable[..., TrainConfig]
WIDE: dict[str, Any] = {
    "model.hidden_size": 1024,
    "model.intermediate_size": 2816,
    "model.num_layers": 4,
    "data.seq_len": 1024,
    "loop.batch_size": 128,
    "loop.micro_batch_size": 1,
}
FULL = {"loop.activation_checkpointing": "full"}
EXPERTS = {**WIDE, "model.num_experts": 64, "model.expert_size": 1024, "loop.batch_size": 1024, **FULL}
# Model, changes, and ranks in nodes of 8: each is slow, for another reason.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "gathers": ("gpt", {**WIDE, "zero": 3}, 16),
    "tensor parallelism": ("gpt", {**WIDE, "zero": 3, "tensor_parallel": 2}, 16),
    "experts": ("moe", {**EXPERTS, "zero": 3, "expert_parallel": 32}, 32),
    "recomputation": ("gpt", {**WIDE, **FULL, "loop.micro_batch_size": 16}, 1),
    "one sequence a rank": ("gpt", {**WIDE, "loop.batch_size": 16}, 16),
}


def plan_on(config: TrainConfig, world_size: int, memory_bytes: int | None = None) -> Forecast:
    device = find_device("h100-80gb")
    if memory_bytes is not None:
        device = replace(device, memory_bytes=memory_bytes)
    machines = Machines("h100-80gb", device, 8, usable_share=1.0)
    return forecast(config, world_size=world_size, vocab_size=100, machines=machines)


def with_changes(config: TrainConfig, advice: str) -> TrainConfig:
    """The config after the changes that the advice names; itself where it names none."""
    raw = config.model_dump()
    for table, key, value in re.findall(r"(\w+)\.(\w+)=(\w+)", advice):
        raw[table][key] = int(value) if value.isdigit() else value
    return TrainConfig.model_validate(raw)


@pytest.mark.parametrize(
    ("case", "part", "key"),
    [
        ("gathers", "gathers and reductions that nothing hides", "loop.micro_batch_size"),
        ("tensor parallelism", "tensor and expert parallelism", "dist.tensor_parallel"),
        ("experts", "tensor and expert parallelism", "dist.expert_parallel"),
        ("one sequence a rank", "gathers and reductions that nothing hides", "loop.batch_size"),
    ],
)
def test_shares_are_those_of_the_forecast(make: Make, case: str, part: str, key: str) -> None:
    model, changes, world_size = CASES[case]
    plan = plan_on(make(model, **changes), world_size)
    assert plan.advice is not None
    products = plan.flops.model / world_size / (989e12 * 0.3)
    assert f"products, each counted once, take {products / plan.time.total:.0%} of a step" in plan.advice
    assert f"{part} {plan.time.rows[part] / plan.time.total:.0%} ({key})" in plan.advice


def test_recomputation_is_told_from_products_that_are_needed(make: Make) -> None:
    model, changes, world_size = CASES["recomputation"]
    plan = plan_on(make(model, **changes), world_size)
    again = plan.flops.recomputed / (989e12 * 0.3) / plan.time.total
    assert plan.advice is not None
    assert f"besides products computed anew {again:.0%} (loop.activation_checkpointing)" in plan.advice
    assert "loop.activation_checkpointing=selective: utilisation" in plan.advice


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("room", [1.0, 1.2, 10.0])
def test_the_change_does_what_is_predicted_and_fits(make: Make, case: str, room: float) -> None:
    model, changes, world_size = CASES[case]
    config = make(model, **changes)
    memory_bytes = int(room * plan_on(config, world_size).memory.peak)
    before = plan_on(config, world_size, memory_bytes)
    assert before.advice is not None
    after = plan_on(with_changes(config, before.advice), world_size, memory_bytes)
    assert after.misfit is None
    if "utilisation" not in before.advice:
        assert room < 10 or case == "one sequence a rank"
        assert before.advice.endswith("No other setting that was tried is predicted to be faster and to fit")
        return
    assert before.advice.endswith(f"utilisation {after.time.mfu:.1%}")
    assert after.time.total <= 0.95 * before.time.total


def test_experts_in_one_node_are_no_advice_where_their_weights_travel_more(make: Make) -> None:
    config = make("moe", **{**EXPERTS, "loop.batch_size": 32, "zero": 3, "expert_parallel": 32})
    inside = make("moe", **{**EXPERTS, "loop.batch_size": 32, "zero": 3, "expert_parallel": 8})
    assert plan_on(inside, 32).time.total > plan_on(config, 32).time.total
    advice = plan_on(config, 32).advice
    assert advice is not None
    assert "dist.expert_parallel=8" not in advice


def test_nothing_is_said_of_a_step_of_products_and_of_a_run_that_does_not_fit(make: Make) -> None:
    config = make(**{**WIDE, "loop.micro_batch_size": 16})
    plan = plan_on(config, 1)
    assert plan.time.mfu > 0.75 * 0.3
    assert plan.advice is None
    slow = make(**WIDE, zero=3)
    assert plan_on(slow, 16, 10**8).misfit is not None
    assert plan_on(slow, 16, 10**8).advice is None


def test_without_a_known_memory_no_change_is_named(make: Make) -> None:
    advice = plan_on(make(**WIDE, zero=3), 16, 0).advice
    assert advice is not None
    assert "tried" not in advice
    assert "utilisation" not in advice
