"""A model with experts is the same run however its experts are spread, and its loads become even."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from muonlm.config.errors import UserError
from muonlm.dist import collectives, process
from muonlm.model import moe, tokens
from muonlm.track.metrics import read_metrics
from muonlm.train.setup import build
from muonlm.train.step import Diverged, check_finite, take_step

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


@pytest.mark.parametrize(
    "changes", [{"balance": "loss", "router": "softmax"}, {"num_shared_experts": 0, "gated": False}]
)
def test_other_routers_and_layers(curves, assert_same_curve, changes) -> None:
    """The auxiliary loss is that of each rank's own tokens, so that it is compared where all ranks have the same."""
    model = {**MOE["model"], **changes}
    size, dist = (2, {"tensor_parallel": 2}) if "balance" in changes else LAYOUTS["ep 2"]
    assert_same_curve(*curves(size, dist, 8, **{**MOE, "model": model}))


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", ["ep x fsdp 2x2", "tp 2"])
def test_recomputation_and_micro_batches(curves, assert_same_curve, layout, recompute) -> None:
    changes = {"loop.activation_checkpointing": recompute, "loop.micro_batch_size": 1}
    assert_same_curve(*curves(*LAYOUTS[layout], 8, **MOE, **changes))


@pytest.mark.parametrize("fault", ["gradient scale", "way back", "weights of rows"])
def test_faults_of_expert_parallelism_are_found(curves, assert_same_curve, monkeypatch, fault) -> None:
    curves(1, {}, 6, **MOE)  # before the fault is there
    if fault == "gradient scale":
        monkeypatch.setattr(moe, "scale_gradient", lambda x, factor: x)
    elif fault == "way back":
        back = tokens.return_rows
        monkeypatch.setattr(tokens, "return_rows", lambda x, traffic: back(x, traffic).roll(1, 0))
    else:
        send = tokens.send_rows
        monkeypatch.setattr(tokens, "send_rows", lambda x, traffic: send(x if x.ndim > 1 else x.detach(), traffic))
    with pytest.raises((AssertionError, UserError)):
        assert_same_curve(*curves(*LAYOUTS["ep 2"], 6, **MOE))


def test_experts_lie_on_the_ranks_that_own_them(make_config, run_ranks) -> None:
    """Of 8 experts 4 on each, whole, so that Muon moves none of them; the rest cut over all ranks."""
    config = make_config(**MOE, **{"loop.batch_size": 12}, dist={"zero": 3, "expert_parallel": 2})

    def one_rank(rank: int, size: int) -> tuple[list[int], int]:
        parts = build(config, process.start(config.dist, "cpu"), {})
        stack = dict(parts.model.named_parameters())["model.layers.1.mlp.experts.up_proj"]
        assert isinstance(stack, DTensor)
        collectives.reset_counters()
        for param in parts.model.parameters():
            param.grad = param.detach().clone()
        parts.optimizer.step()
        return list(stack.to_local().shape), collectives.counters()["all_to_all"]["bytes"]

    for shape, moved in run_ranks(one_rank, 2, join=False):
        assert shape == [4, 16, 32]
        # attention of three layers, one dense layer, two shared experts: half of each matrix to its owner or back
        numel = 3 * (2 * 32 + 2 * 16) * 32 + 3 * 64 * 32 + 2 * 3 * 16 * 32
        assert moved == pytest.approx(numel / 2 * 4, rel=0.1)


def test_tokens_travel_as_counted(make_config, run_ranks) -> None:
    """Forward and backward pass: tokens there and back, gradients too, with their weights, counts before."""
    config = make_config(**MOE, **{"loop.batch_size": 12}, dist={"zero": 3, "expert_parallel": 2})

    def one_rank(rank: int, size: int) -> tuple[int, int]:
        parts = build(config, process.start(config.dist, "cpu"), {})
        ids = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(rank))
        collectives.reset_counters()
        parts.wrapped(ids[:, :-1], ids[:, 1:]).backward()
        count = collectives.counters()["expert_all_to_all"]
        return count["calls"], count["bytes"]

    calls, sent = zip(*run_ranks(one_rank, 2, join=False), strict=True)
    assert calls == (2 * (1 + 3 + 3),) * 2  # counts; rows, weights, results; and their gradients
    rows = 2 * 2 * 2 * 32 * 2  # layers, ranks, sequences, positions, experts of each: an even half of them travels
    assert sum(sent) == pytest.approx(rows / 2 * (4 * 32 + 2) * 4, rel=0.3)


@pytest.mark.parametrize(("balance", "is_even"), [("bias", True), ("loss", True), ("none", False)])
def test_loads_become_even_on_text(make_config, run_ranks, balance, is_even) -> None:
    model = {**MOE["model"], "hidden_size": 64, "expert_size": 64, "intermediate_size": 128, "balance": balance}
    config = make_config(**{**MOE, "model": model, "loop.batch_size": 16, "loop.steps": 150})

    def one_rank(rank: int, size: int) -> list[float]:
        parts = build(config, process.start(config.dist, "cpu"), {})
        steps = [take_step(parts, i, i * 16, measure=i >= 120, stop=False) for i in range(150)]
        assert all(step.balance.dropped_rows == 0 for step in steps[120:])
        return [step.balance.max_load for step in steps[120:]]

    [loads] = run_ranks(one_rank, 1, join=False)
    assert (statistics.mean(loads) < 1.5) == is_even, loads


def test_a_run_goes_on_with_its_experts_spread_in_another_way(make_config, train_ranks) -> None:
    """Weights, momentum, and the biases of the experts, without which the loads would be others."""
    short = {"loop.steps": 18, "loop.batch_size": 12, "checkpoint.interval_steps": 5, **MOE}
    straight = make_config("straight", **short)
    train_ranks(straight)
    stops = [("ep 2", 6), ("tp 2", 11), ("ep x fsdp 2x2", None)]
    for layout, at in stops:
        size, dist = LAYOUTS[layout]
        train_ranks(make_config("changed", **short, dist=dist), size, at=at)
    runs = (straight, make_config("changed", **short))
    records = [[r for r in read_metrics(c.resolved_run_dir) if r["kind"] == "train"] for c in runs]
    assert [r["loss"] for r in records[1]] == pytest.approx([r["loss"] for r in records[0]], abs=1e-5)
    assert [r["experts"] for r in records[1]] == [pytest.approx(r["experts"], rel=1e-5) for r in records[0]]


def test_a_skipped_step_moves_no_bias(make_config, run_ranks) -> None:
    model = {**MOE["model"], "init_std": 1e30}
    config = make_config(**{**MOE, "model": model, "optim.non_finite": "skip", "loop.batch_size": 12})

    def one_rank(rank: int, size: int) -> tuple[bool, Any]:
        parts = build(config, process.start(config.dist, "cpu"), {})
        result = take_step(parts, 0, 0, measure=True, stop=False)
        return result.is_skipped, [float(b.abs().sum()) for b in parts.model.buffers()]

    [(is_skipped, biases)] = run_ranks(one_rank, 1, join=False)
    assert is_skipped
    assert biases == [0.0, 0.0]


def test_a_bias_that_is_not_finite_is_found(make_config, run_ranks) -> None:
    def one_rank(rank: int, size: int) -> str:
        config = make_config(**MOE, **{"loop.batch_size": 12}, dist={"zero": 3})
        parts = build(config, process.start(config.dist, "cpu"), {})
        parts.model.model.layers[2].mlp.gate.e_score_correction_bias[1] = float("nan")
        with pytest.raises(Diverged) as caught:
            check_finite(parts, 0, "as loaded from there")
        return str(caught.value)

    messages = run_ranks(one_rank, 2, join=False)
    assert set(messages) == {
        "step 0: model.layers.2.mlp.gate.e_score_correction_bias is not finite as loaded from there"
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [("ddp 2", "selective"), ("fsdp 2", "selective"), ("ep 2", "none"), ("ep 2", "full"), ("tp 2", "selective")],
)
def test_compiled_blocks_have_the_curve_of_one_process(curves, largest_difference, layout, recompute) -> None:
    """The same arithmetic in another order: a compiler fuses sums."""
    size, dist = LAYOUTS[layout]
    changes = {"loop.compile": True, "loop.activation_checkpointing": recompute, "model.num_layers": 2}
    model = {**MOE["model"], "num_layers": changes.pop("model.num_layers")}
    ranks, alone = curves(size, dist, 3, timeout_s=400, **{**MOE, "model": model}, **changes)
    assert largest_difference(ranks[0], alone) < 1e-4
