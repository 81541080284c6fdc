"""ZeRO-1 and 2 take the step of one process, with the communication of ZeRO-AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.optim.muon import Muon
from muonlm.optim.pieces import Split
from muonlm.optim.zero import ZeroDataParallel

SHAPES = {
    "embed": (50, 16),
    "qkv": (48, 16),
    "up": (40, 16),
    "experts": (6, 12, 16),
    "down": (16, 40),
    "norm": (16,),
    "out": (16, 16),
    "row": (1, 16),
}
MATRICES = {"qkv", "up", "experts", "down", "out", "row"}


class Weights(nn.Module):
    """A loss whose gradient is any given one: the sum of the products."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) * 0.1))

    def forward(self, factors: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((getattr(self, name) * factor).sum() for name, factor in factors.items())


def factors(step: int, skip: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: factor for name, factor in drawn.items() if name not in skip}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    return [
        {"params": [(n, named[n]) for n in ("up", "experts", "down", "out", "row")], "name": "hidden"},
        {"params": [("qkv", named["qkv"])], "split": Split(sizes=(16, 16, 16)), "name": "qkv"},
        {"params": [(n, named[n]) for n in ("embed", "norm")], "rule": "adamw", "lr": 0.01, "name": "rest"},
    ]


def train(
    stage: int, *, micro: int = 1, bucket_bytes: int = 4096, skip: frozenset[str] = frozenset(), **options: Any
) -> dict[str, Any]:
    """Three steps; the same gradient on every rank. Stage 0 is one process, or replicas without an engine."""
    model = Weights()
    engine = None
    if stage:
        engine = ZeroDataParallel(
            model, matrices=MATRICES, stacks=frozenset({"experts"}), stage=stage, bucket_bytes=bucket_bytes
        )
    optimizer = Muon(groups(model), lr=0.05, dtype=torch.float32, sharding=engine, **options)
    collectives.reset_counters()
    for step in range(3):
        optimizer.zero_grad()
        for number in range(micro):
            wrapped = engine or model
            if engine is not None and number + 1 < micro:
                with engine.no_sync():
                    (wrapped(factors(step, skip)) / micro).backward()
            else:
                (wrapped(factors(step, skip)) / micro).backward()
            if engine is not None and (stage == 2 or number + 1 == micro):
                assert all(p.grad is None for name, p in model.named_parameters()), "gradients are freed as they leave"
        norms = optimizer.clip_gradients().by_group
        optimizer.step()
    local = sum(state["momentum_buffer"].numel() for state in optimizer.state.values() if "momentum_buffer" in state)
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "counts": collectives.counters(),
        "momentum_numel": local,
        "plan": engine.plan if engine else None,
        "norms": norms,
    }


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("world", "bucket_bytes"), [(2, 4096), (2, 2**20), (4, 4096), (4, 2**20)])
def test_equals_one_process_bit_for_bit(run_ranks, stage, world, bucket_bytes) -> None:
    expected = train(0)["weights"]
    for result in run_ranks(lambda rank, size: train(stage, bucket_bytes=bucket_bytes), world):
        assert all(torch.equal(weight, expected[name]) for name, weight in result["weights"].items())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world", [3, 8])
def test_averages_that_round_and_micro_batches(run_ranks, stage, world) -> None:
    """Sums of three and more gradients, and of micro-batches, round: equal up to fp32 noise."""
    expected = train(0)
    for result in run_ranks(lambda rank, size: train(stage, micro=3), world):
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][name], atol=2e-6, rtol=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_communication_is_that_of_zero_adamw(run_ranks, stage) -> None:
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    for world in (2, 4):
        for result in run_ranks(lambda rank, size: train(stage, bucket_bytes=2**20), world):
            counts = result["counts"]
            assert counts["reduce_scatter"]["bytes"] <= 1.05 * 3 * 4 * total
            assert counts["all_gather"]["bytes"] * world <= 1.05 * 3 * 4 * total
            assert "all_to_all" not in counts, "whole matrices have owners: nothing else travels"
            assert result["momentum_numel"] < 1.6 * (total - 50 * 16 - 16) / world


def test_stage_1_reduces_once_a_step(run_ranks) -> None:
    calls = {
        stage: run_ranks(lambda rank, size, s=stage: train(s, micro=4, bucket_bytes=2**20), 2)[0]["counts"]
        for stage in (1, 2)
    }
    assert calls[1]["reduce_scatter"]["calls"] == 3
    assert calls[2]["reduce_scatter"]["calls"] == 12


def test_parameters_without_gradient_are_left_alone(run_ranks) -> None:
    skip = frozenset({"up", "norm"})
    expected = train(0, skip=skip)["weights"]
    for result in run_ranks(lambda rank, size: train(2, skip=skip, micro=2), 2):
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
        assert torch.equal(result["weights"]["up"], Weights().up)


def test_a_gradient_on_some_ranks_only_is_an_error_on_all(run_ranks) -> None:
    def run(rank: int, size: int) -> str:
        with pytest.raises(UserError) as error:
            train(1, skip=frozenset({"up"}) if rank else frozenset())
        return str(error.value)

    messages = run_ranks(run, 2, timeout_s=20)
    assert messages[0] == messages[1]
    assert "up has no gradient on rank 1" in messages[0]


def test_a_rank_without_backward_does_not_hang(run_ranks) -> None:
    def run(rank: int, size: int) -> str:
        model = Weights()
        engine = ZeroDataParallel(model, matrices=MATRICES, stacks=frozenset({"experts"}))
        optimizer = Muon(groups(model), dtype=torch.float32, sharding=engine)
        if rank == 0:
            engine(factors(0)).backward()
        with pytest.raises(UserError) as error:
            optimizer.step()
        return str(error.value)

    assert all("has no gradient on rank 1" in message for message in run_ranks(run, 2, timeout_s=20))


def test_values_come_from_rank_0(run_ranks) -> None:
    def run(rank: int, size: int) -> torch.Tensor:
        model = Weights()
        with torch.no_grad():
            model.up.add_(rank)
        ZeroDataParallel(model, matrices=MATRICES)
        return model.up.detach().clone()

    assert all(torch.equal(up, Weights().up) for up in run_ranks(run, 2))


def test_loaded_values_reach_the_slots(run_ranks) -> None:
    """A parameter that is cut keeps a copy: what load_state_dict writes there must not be lost at the next step."""

    def run(rank: int, size: int) -> bool:
        model = Weights()
        engine = ZeroDataParallel(model, matrices=MATRICES, stacks=frozenset({"experts"}), bucket_bytes=2**20)
        other = {name: torch.full_like(value, 2.0) for name, value in model.state_dict().items()}
        model.load_state_dict(other)
        optimizer = Muon(groups(model), lr=0.0, dtype=torch.float32, sharding=engine, weight_decay=0.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        engine(factors(0)).backward()
        optimizer.step()
        return all(torch.equal(value, other[name]) for name, value in model.state_dict().items())

    assert all(run_ranks(run, 3))


def test_refuses_what_it_cannot_lay_out() -> None:
    model = nn.Linear(4, 4)
    model.half_bias = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(UserError, match="one dtype and device"):
        ZeroDataParallel(model, matrices=set())
    engine = ZeroDataParallel(nn.Linear(4, 4, bias=False), matrices={"weight"})
    with pytest.raises(UserError, match="no trainable parameter of the module"):
        Muon([nn.Parameter(torch.ones(2, 2))], sharding=engine)
