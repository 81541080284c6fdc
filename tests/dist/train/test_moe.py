"""A model with experts is the same run however its experts are spread, and its loads become even."""

from __future__ import annotations

from typing import Any

import pytest

NUM_STEPS = 30
MOE: dict[str, Any] = {
    "model": {
        "kind": "moe",
        "num_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_experts": 8,
        "expert_size": 16,
        "bias_rate": 0.01,
    },
    "optim.newton_schulz": {"dtype": "float32"},
}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "ddp 2": (2, {}),
    "zero-1 2": (2, {"zero": 1}),
    "fsdp 2": (2, {"zero": 3}),
    "ep 2": (2, {"zero": 3, "expert_parallel": 2}),
    "ep x fsdp 2x2": (4, {"zero": 3, "expert_parallel": 2}),
    "tp 2": (2, {"tensor_parallel": 2}),
}
SLOW_LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "ep 4": (4, {"zero": 3, "expert_parallel": 4}),
    "ep x hsdp 2x2": (4, {"zero": 3, "expert_parallel": 2, "replicas": 2}),
    "ep x tp 2x2": (4, {"zero": 3, "expert_parallel": 2, "tensor_parallel": 2}),
    "ep x fsdp 2x3": (6, {"zero": 3, "expert_parallel": 2}),
    "ep x fsdp x tp 2x2x2": (8, {"zero": 3, "expert_parallel": 2, "tensor_parallel": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_loss_curve_of_one_process(curves, assert_same_curve, layout) -> None:
    ranks, alone = curves(*LAYOUTS[layout], NUM_STEPS, **MOE)
    assert_same_curve(ranks, alone)
    assert alone["loss"][0] - alone["loss"][-1] > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_further_layouts(curves, assert_same_curve, layout) -> None:
    assert_same_curve(*curves(*SLOW_LAYOUTS[layout], NUM_STEPS, **MOE))
