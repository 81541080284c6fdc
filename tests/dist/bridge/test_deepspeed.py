"""Muon under DeepSpeed's ZeRO takes the steps of one process, with little traffic, in every way of sharding."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muonlm.config.errors import UserError
from muonlm.optim.gradients import NonFiniteGradient

OnRanks = Callable[..., list[Any]]
STEPS = 6


def largest_difference(weights: dict[str, Any], others: dict[str, Any]) -> float:
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


def check_equal(gpt: SimpleNamespace, on_ranks: OnRanks, world: int, stage: int, **options: Any) -> None:
    """Losses and weights after some clipped steps are those of one process."""
    expected = gpt.reference(STEPS, clip=0.5)

    def body(rank: int, world: int) -> Any:
        engine = gpt.engine(gpt.config(stage, clip=0.5, **options))
        return gpt.train(engine, STEPS), gpt.weights(engine)

    for losses, weights in on_ranks(body, world):
        assert losses == pytest.approx(expected.losses, abs=1e-6)
        assert largest_difference(weights, expected.weights) < 5e-7


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipped_steps_are_those_of_one_process(stage: int, gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    check_equal(gpt, on_ranks, 2, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_and_micro_batches_change_nothing(stage: int, gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    check_equal(gpt, on_ranks, 4, stage, accumulate=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_curve_of_thirty_steps_is_that_of_one_process(stage: int, gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    expected = gpt.reference(30, clip=0.5)
    losses = on_ranks(lambda rank, world: gpt.train(gpt.engine(gpt.config(stage, clip=0.5)), 30), 2)[0]
    assert losses == pytest.approx(expected.losses, abs=1e-5)
    assert losses[-1] < losses[0] - 1


ZERO = {
    "round robin": (2, {"round_robin_gradients": True}),
    "on the CPU, 2": (2, {"offload_optimizer": {"device": "cpu"}}),
    "on the CPU, 3": (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    "sub-groups": (3, {"sub_group_size": 2000}),
    "none kept whole": (3, {"stage3_param_persistence_threshold": 0}),
    "not contiguous": (3, {"contiguous_gradients": False}),
    "all-reduce": (3, {"reduce_scatter": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO)
def test_every_way_of_zero_takes_the_steps_of_one_process(name: str, gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    stage, zero = ZERO[name]
    check_equal(gpt, on_ranks, 2, stage, zero=zero)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_is_as_near_as_its_gradients(stage: int, gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    expected = gpt.reference(STEPS)
    bf16: dict[str, Any] = {"bf16": {"enabled": True}}
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}}

    for keys in (bf16, bf16 | fp32_sums):
        losses = on_ranks(lambda rank, world, keys=keys: gpt.train(gpt.engine(gpt.config(stage, **keys)), STEPS), 2)[0]
        assert losses == pytest.approx(expected.losses, abs=5e-3)


@pytest.mark.slow
def test_parameters_made_under_zero_init(gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    expected = gpt.reference(STEPS)

    def body(rank: int, world: int) -> Any:
        import deepspeed

        deepspeed.init_distributed("gloo")
        source = gpt.new_model()
        with deepspeed.zero.Init(config_dict_or_path=gpt.config(3)):
            model = type(source)(source.config, source.vocab_size)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            if rank == 0:
                model.load_state_dict(source.state_dict())
        engine = gpt.engine(gpt.config(3), model=model)
        return gpt.train(engine, STEPS), gpt.weights(engine)

    losses, weights = on_ranks(body, 2)[0]
    assert losses == pytest.approx(expected.losses, abs=1e-6)
    assert largest_difference(weights, expected.weights) < 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_stacks_of_experts_are_cut_too(stage: int, gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    expected = gpt.reference(STEPS, experts=True)

    def body(rank: int, world: int) -> Any:
        engine = gpt.engine(gpt.config(stage), model=gpt.new_model(experts=True))
        return gpt.train(engine, STEPS), gpt.weights(engine)

    losses, weights = on_ranks(body, 2)[0]
    assert losses == pytest.approx(expected.losses, abs=1e-5)
    assert largest_difference(weights, expected.weights) < 5e-6


def test_only_cut_matrices_travel_and_state_stays_sharded(gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    """Stage 1: the matrix that the border of two partitions cuts; all others are computed where they lie."""

    def body(rank: int, world: int) -> Any:
        from muonlm.dist import collectives

        engine = gpt.engine(gpt.config(1))
        optimizer = engine.optimizer.optimizer
        collectives.reset_counters()
        gpt.train(engine, 1)
        muon = [shard for bound in optimizer.partitions if bound.muon is not None for shard in bound.shards]
        cut = {shard.name: shard.layout.shape for shard in muon if len(shard.layout.by_rank) > 1}
        state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim)
        return collectives.counters()["all_to_all"]["bytes"], cut, state

    ranks = on_ranks(body, 2)
    cut = ranks[0][1]
    assert len(cut) == 1  # all hidden matrices are one group
    numel = sum(torch.Size(shape).numel() for shape in cut.values())
    # In fp32, to the rank that computes it and back.
    assert 0 < sum(sent for sent, *_ in ranks) <= 2 * 4 * numel
    params = dict(gpt.new_model().named_parameters())
    matrices = sum(p.numel() for name, p in params.items() if p.ndim == 2 and "layers" in name)
    others = sum(p.numel() for p in params.values()) - matrices
    assert sum(state for *_, state in ranks) == pytest.approx(matrices + 2 * others, rel=0.01)


@pytest.mark.slow
def test_partitions_that_are_computed_elsewhere(
    gpt: SimpleNamespace, on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with offload on a machine with GPUs: values and momentum come back, and no copy outlives a step."""
    from muonlm.bridge.deepspeed.bound import Desk

    monkeypatch.setattr(Desk, "_fetched", lambda desk, tensor: tensor.clone())
    check_equal(gpt, on_ranks, 2, 3, zero={"offload_optimizer": {"device": "cpu"}})


def test_learning_rates_are_those_of_the_groups(gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    """Schedules of DeepSpeed's write them there: with 0 nothing moves, neither under Muon nor under AdamW."""

    def body(rank: int, world: int) -> None:
        engine = gpt.engine(gpt.config(2))
        groups, start = engine.optimizer.param_groups, gpt.weights(engine)
        for lr, is_moved in ((0.0, False), (0.01, True)):
            for group in groups:
                group["lr"] = lr
            gpt.train(engine, 1)
            now = gpt.weights(engine)
            assert [name for name in start if torch.equal(start[name], now[name]) == is_moved] == []

    on_ranks(body, 1)


def test_without_bind_nothing_is_updated(gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    """A flat partition taken for a parameter would be trained elementwise, or as a matrix of one row."""

    def body(rank: int, world: int) -> None:
        import deepspeed

        from muonlm.bridge.deepspeed import muon_for_deepspeed

        model = gpt.new_model()
        optimizer = muon_for_deepspeed(model, **gpt.muon)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=gpt.config(2))
        with pytest.raises(UserError, match="until then nobody knows which matrices"):
            gpt.train(engine, 1)
        assert largest_difference(gpt.weights(engine), dict(gpt.new_model().named_parameters())) == 0

    on_ranks(body, 1)


@pytest.mark.parametrize("non_finite", ["raise", "skip"])
def test_non_finite_gradients_leave_everything_as_it_is(
    non_finite: str, gpt: SimpleNamespace, on_ranks: OnRanks
) -> None:
    """Where DeepSpeed is told not to look itself; else it leaves such steps out, and the optimizer is not called."""

    bf16 = {"enabled": True, "check_grad_overflow": False}

    def body(rank: int, world: int) -> None:
        engine = gpt.engine(gpt.config(2, bf16=bf16), muon={**gpt.muon, "non_finite": non_finite})
        optimizer = engine.optimizer.optimizer
        before = [bound.flat.detach().clone() for bound in optimizer.partitions]
        loss = gpt.loss_of(engine, gpt.tokens(0).chunk(world)[rank])
        engine.backward(loss * (math.nan if rank == 1 else 1))
        if non_finite == "raise":
            with pytest.raises(NonFiniteGradient, match="nothing was updated"):
                engine.step()
        else:
            engine.step()
            assert optimizer.num_skipped == 1
        assert all(torch.equal(bound.flat, old) for bound, old in zip(optimizer.partitions, before, strict=True))
        assert all(not t.any() for state in optimizer.state.values() for t in state.values())

    on_ranks(body, 2)
