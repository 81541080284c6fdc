"""`dist.engine = "deepspeed"`: the run is the one that torch's engine trains, and either goes on with the other's."""

from __future__ import annotations

import importlib
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from muonlm.bridge.deepspeed.training import import_deepspeed
from muonlm.cli.main import main
from muonlm.config.errors import UserError
from muonlm.dist import process
from muonlm.track.metrics import read_metrics
from muonlm.train.loop import train
from muonlm.train.setup import build
from muonlm.train.step import Diverged, check_finite, take_step

BATCH = 12
TOLERANCE = 1e-5
EXACT = {"optim.newton_schulz": {"dtype": "float32"}}
SHORT = {"loop.steps": 12, "loop.batch_size": BATCH, "eval.interval_steps": 5, "checkpoint.interval_steps": 5, **EXACT}
MOE = {"model.kind": "moe", "model.num_experts": 5, "model.expert_size": 24, "model.experts_per_token": 2}


@pytest.fixture(autouse=True)
def _imported() -> None:
    """Before ranks are forked."""
    pytest.importorskip("deepspeed")
    import_deepspeed(torch.device("cpu"))
    for module in ("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2"):
        importlib.import_module(module)


def engine(stage: int, **keys: Any) -> dict[str, Any]:
    """The [dist] table."""
    return {"engine": "deepspeed", "zero": stage, **keys}


@pytest.mark.parametrize(("size", "stage"), [(2, 1), (3, 2), (2, 3), (3, 3)])
def test_every_stage_has_the_loss_curve_of_one_process(curves, size, stage, assert_same_curve) -> None:
    """Norms by group, and clipping, which the first steps need, too."""
    ranks, alone = curves(size, engine(stage), **EXACT, timeout_s=120)
    assert_same_curve(ranks, alone)
    assert alone["loss"][0] - alone["loss"][-1] > 2.0


@pytest.mark.parametrize(
    ("size", "stage", "changes"),
    [
        (2, 1, {"loop.micro_batch_size": 2, "model.tie_embeddings": True}),
        (3, 2, {"loop.micro_batch_size": 2, "loop.activation_checkpointing": "selective"}),
        (2, 3, {"loop.micro_batch_size": 3, "loop.activation_checkpointing": "full"}),
        (2, 3, {"model.tie_embeddings": True, "loop.grad_clip": 0.1}),
        (2, 2, {"loop.grad_clip": 0.1, "optim.kind": "adamw"}),
        (1, 1, {"loop.micro_batch_size": 6}),
        (1, 3, {}),
        (2, 2, MOE),
        (2, 3, {**MOE, "loop.micro_batch_size": 3}),
    ],
)
def test_micro_batches_tied_tables_experts_and_recomputation(curves, size, stage, changes, assert_same_curve) -> None:
    exact = {} if changes.get("optim.kind") == "adamw" else EXACT
    ranks, alone = curves(size, engine(stage), 8, **exact, **changes, timeout_s=120)
    assert_same_curve(ranks, alone)
    for balance, whole in zip(ranks[0]["balance"], alone["balance"], strict=True):
        assert balance == (whole and pytest.approx(whole, rel=1e-4))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_whole_run_records_what_one_process_does(make_config, train_ranks, assert_same_records, stage) -> None:
    """Evaluation, norms, checkpoints: all that communicates besides the steps."""
    ours, theirs = make_config("ours", **SHORT, dist=engine(stage)), make_config("theirs", **SHORT)
    assert {status.state for status in train_ranks(ours, 3)} == {"finished"}
    train_ranks(theirs)
    assert_same_records(ours, theirs)
    rules = Path(ours.resolved_run_dir, "rules.txt").read_text()
    assert "exchange plan: 14 matrices on 3 ranks" in rules


@pytest.mark.parametrize("stage", [1, 3])
def test_a_stopped_run_goes_on_bit_for_bit(make_config, train_ranks, assert_same_run, stage) -> None:
    straight, stopped = (make_config(name, **SHORT, dist=engine(stage)) for name in ("straight", "stopped"))
    train_ranks(straight, 2)
    assert {status.state for status in train_ranks(stopped, 2, at=6, signum=signal.SIGTERM, on=1)} == {"preempted"}
    assert {status.state for status in train_ranks(stopped, 2)} == {"finished"}
    assert_same_run(straight, stopped)


@pytest.mark.parametrize("changes", [{}, {**MOE, "model.tie_embeddings": True}])
def test_a_run_goes_on_under_another_engine(make_config, train_ranks, changes) -> None:
    settings = {**SHORT, **changes}
    straight = make_config("straight", **settings)
    train_ranks(straight)
    for dist, size, at in [(engine(3), 3, 3), ({"zero": 2}, 2, 6), (engine(1), 2, None)]:
        changed = make_config("changed", **settings, dist=dist)
        statuses = train_ranks(changed, size, at=at)
    assert {status.state for status in statuses} == {"finished"}
    losses = [[r["loss"] for r in read_metrics(c.resolved_run_dir) if "loss" in r] for c in (straight, changed)]
    assert losses[1] == pytest.approx(losses[0], abs=TOLERANCE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_state_trains_the_same(curves, tmp_path, stage, assert_same_curve) -> None:
    keys = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 5000}}
    (tmp_path / "ds.json").write_text(json.dumps(keys))
    dist = engine(stage, deepspeed_config=str(tmp_path / "ds.json"))
    ranks, alone = curves(2, dist, 8, **EXACT, **{"loop.micro_batch_size": 3}, timeout_s=120)
    assert_same_curve(ranks, alone)


@pytest.mark.parametrize("factor", [math.nan, 1.0], ids=["gradients", "loss alone"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_is_left_out_whole(make_config, run_ranks, stage, factor) -> None:
    """Weights, momentum and the step after it are as if it had not been."""
    config = make_config(dist=engine(stage), **{"loop.batch_size": BATCH, "optim.non_finite": "skip", **EXACT})

    def losses(rank: int, bad_step: int | None) -> list[float]:
        parts = build(config, process.start(config.dist, "cpu"), {})
        found = []
        for step in range(4):
            if step == bad_step:
                forward = parts.model.forward
                parts.model.forward = lambda *args, forward=forward: (
                    forward(*args) * factor + math.nan if rank else forward(*args)
                )
                result = take_step(parts, 2, 0, measure=True, stop=False)
                assert result.is_skipped
                assert set(result.updates.by_group.values()) == {0.0}
                parts.model.forward = forward
            found.append(take_step(parts, step, step * BATCH, measure=True, stop=False).loss)
        return found

    skipped, straight = (
        run_ranks(lambda rank, size, bad=bad: losses(rank, bad), 2, join=False, timeout_s=120) for bad in (2, None)
    )
    assert skipped == straight


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_not_finite_stops_all_ranks_by_name(make_config, run_ranks, stage) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def one_rank(rank: int, size: int) -> list[str]:
        config = make_config(dist=engine(stage))
        parts = build(config, process.start(config.dist, "cpu"), {})
        hidden = next(group for group in parts.optimizer.param_groups if group["name"] == "hidden")
        (shard,) = [shard for shard in parts.optimizer.shards(hidden) if shard.name == name]
        messages = []
        kept = shard.local()[:1].clone()
        shard.local()[:1] = math.inf
        with pytest.raises(Diverged) as caught:
            check_finite(parts, 3)
        messages.append(str(caught.value))
        shard.local()[:1] = kept
        forward = parts.model.forward
        parts.model.forward = lambda *args: forward(*args) * (math.nan if rank == 1 else 1.0)
        with pytest.raises(Diverged) as caught:
            take_step(parts, 3, 0, measure=False, stop=False)
        return [*messages, str(caught.value)]

    every = run_ranks(one_rank, 2, join=False, timeout_s=120)
    assert every[0] == every[1]
    assert f"step 3: {name} is not finite after the update" in every[0][0]
    assert (
        "step 4: the loss is not finite on rank 1; the first parameter with a non-finite value or gradient is"
        in (every[0][1])
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}',
            r"loop\.grad_clip decides that[\s\S]*dist\.zero",
        ),
        ('{"bf16": {"enabled": true}, "bogus": 1}', r"bf16: loop\.precision decides that\n  bogus: not taken here"),
        ('{"zero_optimization": {"bogus": 1}}', "zero_optimization: bogus: Extra inputs are not permitted"),
        ('{"zero_optimization": {"sub_group_size": "x"}}', "sub_group_size: Input should be a valid integer"),
        ('{"zero_optimization": {"mics_shard_size": "x"}}', "mics_shard_size: Extra inputs are not"),
        (
            '{"zero_optimization": {"offload_optimizer": {"ratio": "x"}}}',
            r"offload_optimizer\.ratio: Input should be a",
        ),
        ('{"zero_optimization": {"zero_quantized_gradients": true}}', "trains something else"),
        ('{"zero_optimization": {"mics_shard_size": 2}}', "MiCS"),
        ('{"zero_optimization": 3}', "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ("{", "cannot be read"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_keys_that_the_run_decides_are_refused(make_config, tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    config = make_config(dist=engine(2, deepspeed_config=str(tmp_path / "ds.json")))
    with pytest.raises(UserError, match=message):
        train(config)
    assert not Path(config.resolved_run_dir, "config.toml").exists()


@pytest.mark.parametrize(
    ("dist", "message"),
    [
        ({"engine": "deepspeed"}, "needs zero = 1, 2 or 3"),
        ({"engine": "deepspeed", "zero": 3, "tensor_parallel": 2}, "has no tensor_parallel"),
        (
            {"engine": "deepspeed", "zero": 3, "replicas": 2, "gather_dtype": "bfloat16"},
            "has no replicas, gather_dtype",
        ),
        ({"zero": 2, "deepspeed_config": "x.json"}, 'needs engine = "deepspeed"'),
    ],
)
def test_layouts_that_deepspeed_does_not_have_are_refused(make_config, dist, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(dist=dist)


@pytest.mark.parametrize("loop", [{"loop.compile": True}, {"loop.activation_checkpointing": "selective"}])
def test_what_hooks_within_blocks_disturb_is_refused(make_config, loop) -> None:
    with pytest.raises(ValueError, match=r'does not go with dist\.engine "deepspeed" and zero = 3'):
        make_config(dist=engine(3), **loop)


@pytest.mark.parametrize("stage", [1, 3])
def test_products_are_in_16_bits_over_fp32_parameters(make_config, run_ranks, stage) -> None:
    """DeepSpeed switches off the autocast around its forward pass."""

    def one_rank(rank: int, size: int) -> list[float]:
        config = make_config(dist=engine(stage), **{"loop.batch_size": BATCH, "loop.precision": "bfloat16", **EXACT})
        parts = build(config, process.start(config.dist, "cpu"), {})
        seen = set()
        attention = parts.model.model.layers[1].self_attn
        attention.register_forward_hook(lambda module, args, out: seen.add((module.q_proj.weight.dtype, out.dtype)))
        ids = torch.zeros((1, 8), dtype=torch.int64)
        with torch.autocast("cpu", enabled=False):  # where DeepSpeed looks for it, on GPUs
            parts.wrapped(ids, ids)
        losses = [take_step(parts, i, i * BATCH, measure=False, stop=False).loss for i in range(8)]
        assert seen == {(torch.float32, torch.bfloat16)}
        return losses

    def alone(rank: int, size: int) -> list[float]:
        config = make_config(**{"loop.batch_size": BATCH, "loop.precision": "bfloat16", **EXACT})
        parts = build(config, process.start(config.dist, "cpu"), {})
        return [take_step(parts, i, i * BATCH, measure=False, stop=False).loss for i in range(8)]

    [theirs] = run_ranks(alone, 1, join=False)
    assert run_ranks(one_rank, 2, join=False, timeout_s=120)[0] == pytest.approx(theirs, abs=2e-3)


def test_a_run_starts_from_the_weights_of_another_model(make_config, train_ranks, tmp_path) -> None:
    """Loaded before DeepSpeed cuts them, and not again where a checkpoint goes on."""
    base = make_config("base", **SHORT)
    train_ranks(base)
    assert main(["export", base.resolved_run_dir, str(tmp_path / "exported")]) == 0
    losses = []
    for dist, size in [(engine(3), 2), ({}, 1)]:
        config = make_config(f"of {size}", **SHORT, dist=dist, init_from=str(tmp_path / "exported"))
        train_ranks(config, size, at=4 if size == 2 else None)
        train_ranks(config, size)
        losses.append([r["loss"] for r in read_metrics(config.resolved_run_dir) if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    assert losses[0][0] < 5.5
