"""Small configurations, and their forecasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from muonlm.config.load import validate
from muonlm.config.schema import TrainConfig
from muonlm.plan.forecast import Forecast, forecast
from muonlm.plan.hardware import Machines, find_device

MODELS: dict[str, dict[str, Any]] = {
    "gpt": {
        "kind": "gpt",
        "num_layers": 2,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
    },
    "moe": {
        "kind": "moe",
        "num_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 4,
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_size": 32,
    },
}


@pytest.fixture
def make() -> Callable[..., TrainConfig]:
    """`make("moe", zero=3, **{"loop.micro_batch_size": 2})`: a config; keys without a dot are those of `dist`."""

    def run(model: str = "gpt", **changes: Any) -> TrainConfig:
        raw: dict[str, Any] = {
            "name": "x",
            "data": {"path": "x", "seq_len": 32},
            "model": dict(MODELS[model]),
            "optim": {"kind": "muon"},
            "schedule": {"warmup_steps": 1},
            "loop": {"steps": 10, "batch_size": 8},
            "dist": {},
        }
        for key, value in changes.items():
            table, _, name = key.rpartition(".")
            raw[table or "dist"][name] = value
        return validate(TrainConfig, raw, "test")

    return run


@pytest.fixture
def plan_of() -> Callable[..., Forecast]:
    """`plan_of(config, world_size, "h100-80gb", per_node=8)`: a forecast with a vocabulary of 100."""

    def run(
        config: TrainConfig, world_size: int = 1, device: str = "cpu", per_node: int = 8, vocab_size: int = 100
    ) -> Forecast:
        machines = Machines(device, find_device(device), per_node)
        return forecast(config, world_size=world_size, vocab_size=vocab_size, machines=machines)

    return run
