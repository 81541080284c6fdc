"""A run is the same run however it is spread over ranks: the loss curve of one process, within fp32 rounding."""

from __future__ import annotations

import json
import math
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from muonlm.config.errors import UserError
from muonlm.dist import process
from muonlm.model import gpt, regions
from muonlm.track.metrics import read_metrics
from muonlm.train.evaluate import evaluate
from muonlm.train.loop import train
from muonlm.train.setup import build
from muonlm.train.step import Diverged, check_finite, take_step

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "ddp 2": (2, {}),
    "zero-1 2": (2, {"zero": 1}),
    "zero-2 3": (3, {"zero": 2}),
    "fsdp 2": (2, {"zero": 3}),
    "fsdp 3": (3, {"zero": 3}),
    "hsdp 2x2": (4, {"zero": 3, "replicas": 2}),
    "tp 2": (2, {"tensor_parallel": 2}),
    "tp x fsdp 2x2": (4, {"zero": 3, "tensor_parallel": 2}),
}
SLOW_LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "ddp 2 x tp 2": (4, {"zero": 3, "replicas": 2, "tensor_parallel": 2}),
    "tp x hsdp 2x2x2": (8, {"zero": 3, "replicas": 2, "tensor_parallel": 2}),
}
BATCH = 12
TOLERANCE = 1e-5
EXACT = {"optim.newton_schulz": {"dtype": "float32"}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_loss_curve_of_one_process(curves, layout, assert_same_curve) -> None:
    ranks, alone = curves(*LAYOUTS[layout], **EXACT)
    assert_same_curve(ranks, alone)
    assert alone["loss"][0] - alone["loss"][-1] > 2.0


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_further_layouts(curves, layout, assert_same_curve) -> None:
    assert_same_curve(*curves(*SLOW_LAYOUTS[layout], **EXACT))


@pytest.mark.slow
@pytest.mark.parametrize("layout", {**LAYOUTS, **SLOW_LAYOUTS})
def test_adamw_alone_has_the_loss_curve_of_one_process(curves, layout, assert_same_curve) -> None:
    assert_same_curve(*curves(*{**LAYOUTS, **SLOW_LAYOUTS}[layout], **{"optim.kind": "adamw"}))


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("fsdp 3", {"loop.micro_batch_size": 2}),
        ("hsdp 2x2", {"loop.micro_batch_size": 1}),
        ("zero-1 2", {"loop.micro_batch_size": 2}),
        ("zero-2 3", {"loop.micro_batch_size": 2}),
        ("tp x fsdp 2x2", {"loop.micro_batch_size": 3, "model.tie_embeddings": True}),
        ("tp 2", {"model.attention": "sdpa", "model.tie_embeddings": True}),
        ("fsdp 2", {"model.tie_embeddings": True, "dist.reshard_after_forward": False}),
    ],
)
def test_micro_batches_tied_tables_and_other_attention(curves, layout, changes, assert_same_curve) -> None:
    size, dist = LAYOUTS[layout]
    dist = {**dist, **{key[5:]: changes[key] for key in changes if key.startswith("dist.")}}
    assert_same_curve(
        *curves(size, dist, 8, **EXACT, **{key: v for key, v in changes.items() if not key.startswith("dist.")})
    )


@pytest.mark.parametrize("layout", ["fsdp 2", "hsdp 2x2", "tp x fsdp 2x2"])
def test_data_that_is_read_twice_exceeds_the_tolerance(curves, monkeypatch, layout, largest_difference) -> None:
    curves(1, {}, 10, **EXACT)  # before the bug is there
    monkeypatch.setattr("muonlm.dist.mesh.Mesh.data_rank", 0)
    ranks, alone = curves(*LAYOUTS[layout], 10, **EXACT)
    assert largest_difference(ranks[0], alone) > 100 * TOLERANCE


def test_a_missing_sum_over_tensor_parallel_ranks_is_found(curves, monkeypatch) -> None:
    """The optimizer refuses gradients that differ where parameters are the same."""
    curves(1, {}, 10, **EXACT)
    monkeypatch.setattr(regions._Enter, "backward", staticmethod(lambda ctx, grad: (grad, None)))
    with pytest.raises(UserError, match="average gradients over the ranks before the step"):
        curves(*LAYOUTS["tp 2"], 10, **EXACT)


def test_a_missing_sum_of_head_norms_is_found(curves, monkeypatch) -> None:
    """The norms of queries and keys would get the gradient of one rank's heads: small, but each parameter counts."""

    def weights(self: gpt.Attention) -> tuple[torch.Tensor, torch.Tensor]:
        return regions.local(self.q_norm.weight), regions.local(self.k_norm.weight)

    curves(1, {}, 10, **EXACT)
    monkeypatch.setattr(gpt.Attention, "_norm_weights", weights)
    with pytest.raises(UserError, match=r"_norm\.weight, which every rank holds, has a gradient of norm"):
        curves(*LAYOUTS["tp 2"], 10, **EXACT)


SHORT = {"loop.steps": 12, "loop.batch_size": BATCH, "eval.interval_steps": 5, "checkpoint.interval_steps": 5, **EXACT}


@pytest.mark.parametrize("layout", ["fsdp 3", "tp x fsdp 2x2", "zero-2 3"])
def test_a_whole_run_records_what_one_process_does(make_config, train_ranks, assert_same_records, layout) -> None:
    """Evaluation, norms, checkpoints: all that communicates besides the steps."""
    size, dist = LAYOUTS[layout]
    ours, theirs = make_config("ours", **SHORT, dist=dist), make_config("theirs", **SHORT)
    assert {status.state for status in train_ranks(ours, size)} == {"finished"}
    train_ranks(theirs)
    assert_same_records(ours, theirs)
    environment = json.loads(Path(ours.resolved_run_dir, "environment.json").read_text())
    assert math.prod(environment["ranks"].values()) == environment["world_size"] == size


@pytest.mark.parametrize("layout", ["fsdp 2", "tp x fsdp 2x2"])
def test_a_stopped_run_goes_on_bit_for_bit(make_config, train_ranks, assert_same_run, layout) -> None:
    size, dist = LAYOUTS[layout]
    straight, stopped = (make_config(name, **SHORT, dist=dist) for name in ("straight", "stopped"))
    train_ranks(straight, size)
    assert {status.state for status in train_ranks(stopped, size, at=6, signum=signal.SIGTERM, on=1)} == {"preempted"}
    assert {status.state for status in train_ranks(stopped, size)} == {"finished"}
    assert_same_run(straight, stopped)


def test_a_run_goes_on_with_another_layout(make_config, train_ranks) -> None:
    straight, changed = make_config("straight", **SHORT), make_config("changed", **SHORT, dist={"zero": 3})
    train_ranks(straight)
    train_ranks(changed, 3, at=6, signum=signal.SIGTERM)
    changed = make_config("changed", **SHORT, dist={"tensor_parallel": 2})
    assert {status.state for status in train_ranks(changed, 2)} == {"finished"}
    losses = [[r["loss"] for r in read_metrics(c.resolved_run_dir) if "loss" in r] for c in (straight, changed)]
    assert losses[1] == pytest.approx(losses[0], abs=TOLERANCE)


def test_what_is_not_finite_on_one_shard_stops_all_ranks(make_config, run_ranks) -> None:
    """Only the ranks that hold the bad element can see it; all give the same message."""
    name = "model.layers.1.mlp.up_proj.weight"

    def one_rank(rank: int, size: int) -> list[str]:
        config = make_config(dist={"zero": 3})
        parts = build(config, process.start(config.dist, "cpu"), {})
        messages = []
        shard = dict(parts.model.named_parameters())[name].to_local()
        if rank == 1:
            shard.data[0, 0] = math.inf
        with pytest.raises(Diverged) as caught:
            check_finite(parts, 3)
        messages.append(str(caught.value))
        with pytest.raises(Diverged) as caught:
            take_step(parts, 3, 0, measure=False, stop=False)
        return [*messages, str(caught.value)]

    every = run_ranks(one_rank, 2, join=False)
    assert every[0] == every[1]
    assert f"step 3: {name} is not finite after the update" in every[0][0]
    assert f"the first parameter with a non-finite value or gradient is {name}" in every[0][1]


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (3, {"dist": {"tensor_parallel": 2}}, "does not divide 3 ranks"),
        (4, {"dist": {"tensor_parallel": 2}}, "needs dist.zero=3"),
        (3, {"dist": {"zero": 3, "replicas": 2}}, "dist.replicas 2 does not divide the 3 ranks; take 1 or 3"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_together(make_config, run_ranks, size, changes, message) -> None:
    def one_rank(rank: int, world_size: int) -> bool:
        with pytest.raises(UserError, match=message):
            train(make_config(**changes))
        return True

    assert run_ranks(one_rank, size, join=False) == [True] * size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_keep_no_more_than_the_layout_says(make_config, run_ranks, layout) -> None:
    """Parameters and state of hidden matrices and of the rest, over all ranks, in copies of the whole."""
    size, dist = LAYOUTS[layout]
    config = make_config(dist=dist, **{"model.num_heads": 4, "loop.batch_size": BATCH})

    def one_rank(rank: int, world_size: int) -> dict[tuple[str, str], int]:
        parts = build(config, process.start(config.dist, "cpu"), {})
        evaluate(
            parts.model, parts.validation_data, parts.eval_indices, batch_size=2, mesh=parts.mesh, dtype=torch.float32
        )
        held: dict[tuple[str, str], int] = defaultdict(int)
        hidden: set[str] = set()
        for group in parts.optimizer.param_groups:
            kind = "matrices" if group["rule"] == "muon" else "rest"
            for shard, param in zip(parts.optimizer.shards(group), group["params"], strict=True):
                hidden |= {shard.name} if kind == "matrices" else set()
                held["logical", kind] += param.numel()
                held["state", kind] += max(
                    shard.local_state(t).numel() for t in parts.optimizer.state[param].values() if t.ndim
                )
        for name, param in parts.model.named_parameters():
            local = param.to_local() if isinstance(param, DTensor) else param
            held["parameters", "matrices" if name in hidden else "rest"] += local.numel()
        return dict(held)

    every = run_ranks(one_rank, size, join=False)
    data = size // dist.get("tensor_parallel", 1)
    cut = {0: 1, 1: 1, 2: 1, 3: data // dist.get("replicas", 1)}[dist.get("zero", 0)]
    state_cut = data if dist.get("zero", 0) in (1, 2) else cut
    for kind, tensor in (("matrices", dist.get("tensor_parallel", 1)), ("rest", 1)):
        logical = every[0]["logical", kind]
        assert sum(held["parameters", kind] for held in every) == logical * size // (cut * tensor)
        assert sum(held["state", kind] for held in every) == logical * size // (state_cut * tensor)


@pytest.mark.parametrize("model", [{}, {"model.kind": "moe", "model.num_experts": 4, "model.expert_size": 32}])
def test_parameters_gathered_in_bfloat16_leave_fp32_masters(make_config, run_ranks, model) -> None:
    """The curve is near that of bfloat16 autocast over fp32 parameters, from which embedding and norms alone differ."""

    def losses(dtype: str) -> Callable[[int, int], list[float]]:
        def one_rank(rank: int, size: int) -> list[float]:
            config = make_config(
                **{"loop.batch_size": BATCH, "loop.precision": "bfloat16", **EXACT, **model},
                dist={"zero": 3, "gather_dtype": dtype},
            )
            parts = build(config, process.start(config.dist, "cpu"), {})
            assert {p.dtype for p in parts.model.parameters()} == {torch.float32}
            seen = set()
            block = parts.model.model.layers[1]
            hook = block.self_attn.register_forward_pre_hook(lambda module, args: seen.add(module.q_proj.weight.dtype))
            found = [take_step(parts, i, i * BATCH, measure=True, stop=False).loss for i in range(12)]
            hook.remove()
            assert seen == {getattr(torch, dtype)}
            assert {p.grad for p in parts.model.parameters()} == {None}
            return found

        return one_rank

    wide, narrow = (run_ranks(losses(dtype), 2, join=False)[0] for dtype in ("float32", "bfloat16"))
    assert wide[0] - wide[-1] > 0.5
    assert narrow == pytest.approx(wide, abs=0.02)
    assert narrow != wide
