"""Accumulation, agreement of the ranks, and what happens when numbers stop being finite."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from muonlm.checkpoint import store
from muonlm.config.ranks import micro_batch_size
from muonlm.dist import process
from muonlm.optim.gradients import NonFiniteGradient
from muonlm.train import loop
from muonlm.train.loop import train
from muonlm.train.setup import build
from muonlm.train.step import Diverged, take_step

STEPS = 3


def _train_steps(config, sequences=0):
    """(losses of the steps, total gradient norms, a weight after them) of this rank."""
    world = process.start(config.dist, config.loop.device)
    parts = build(config, world, {})
    results = [take_step(parts, i, sequences + i * 6, measure=i == 0, stop=False) for i in range(STEPS)]
    return [r.loss for r in results], [r.grads.total for r in results], parts.model.model.norm.weight.detach().tolist()


def test_micro_batches_and_ranks_do_not_change_the_step(make_config, run_ranks) -> None:
    """6 sequences in one pass, in passes of 2, on 2 ranks in passes of 1, on 3 ranks: one and the same batch."""
    changes = {"optim.kind": "adamw", "data.seq_len": 31}
    whole = run_ranks(lambda rank, size: _train_steps(make_config(**changes)), 1, join=False)
    for size, micro in ((1, 2), (2, 1), (3, None)):
        config = make_config(**changes, **{"loop.micro_batch_size": micro})
        for losses, norms, weight in run_ranks(lambda rank, size, c=config: _train_steps(c), size, join=False):
            assert losses == pytest.approx(whole[0][0], rel=1e-5)
            assert norms == pytest.approx(whole[0][1], rel=1e-4)
            assert weight == pytest.approx(whole[0][2], rel=1e-3)


def test_a_batch_that_does_not_divide_is_refused_with_a_way_out(make_config) -> None:
    with pytest.raises(ValueError, match=r"batch_size 6 is not divisible by 4 ranks .* take loop.batch_size=4"):
        micro_batch_size(make_config(), 4)
    with pytest.raises(ValueError, match=r"2 ranks x loop.micro_batch_size 2 = 4"):
        micro_batch_size(make_config(**{"loop.micro_batch_size": 2}), 2)
    assert micro_batch_size(make_config(), 3) == 2


def _poisoned(parts, *, rank: int, from_step: int, name: str) -> None:
    """From that step on, the gradient of one parameter on one rank is NaN."""
    calls = []

    def hook(grad: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return grad * math.nan if parts.world.rank == rank and len(calls) > from_step else grad

    dict(parts.model.named_parameters())[name].register_hook(hook)


def test_a_bad_gradient_on_one_rank_stops_all_before_anything_changes(make_config, run_ranks) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def one_rank(rank, size):
        config = make_config()
        parts = build(config, process.start(config.dist, "cpu"), {})
        _poisoned(parts, rank=1, from_step=1, name=name)
        take_step(parts, 0, 0, measure=False, stop=False)
        before = copy.deepcopy((parts.model.state_dict(), parts.optimizer.state_dict()["state"]))
        with pytest.raises(Diverged) as caught:
            take_step(parts, 1, 6, measure=False, stop=False)
        after = (parts.model.state_dict(), parts.optimizer.state_dict()["state"])
        same = all(torch.equal(before[0][k], after[0][k]) for k in after[0]) and all(
            torch.equal(before[1][i][k], after[1][i][k]) for i in after[1] for k in after[1][i]
        )
        return str(caught.value), same

    for message, same in run_ranks(one_rank, 2, join=False):
        assert f"step 2: non-finite gradient in {name}" in message
        assert same


def test_a_bad_loss_on_one_rank_names_rank_and_step_on_all(make_config, run_ranks) -> None:
    def one_rank(rank, size):
        config = make_config()
        parts = build(config, process.start(config.dist, "cpu"), {})
        if rank == 1:
            with torch.no_grad():
                parts.model.model.norm.weight.mul_(math.nan)
        with pytest.raises(Diverged) as caught:
            take_step(parts, 4, 0, measure=True, stop=False)
        return str(caught.value)

    for message in run_ranks(one_rank, 2, join=False):
        assert "step 5: the loss is not finite on rank 1; " in message
        assert "the first parameter with a non-finite value or gradient is model." in message


@pytest.mark.parametrize(("lr", "interval"), [(1e38, 1), (1e30, 1), (1e18, 1), (1e38, 100)])
def test_a_diverging_run_fails_and_saves_nothing_bad(make_config, final_state, lr, interval) -> None:
    """Rates at which the update, the loss or a gradient overflows, recorded at each step or not."""
    config = make_config(
        **{"optim.kind": "adamw", "optim.aux": {"lr": lr}, "optim.lr": lr, "schedule.warmup_steps": 0},
        **{"checkpoint.interval_steps": 1, "checkpoint.keep": 99, "track.interval_steps": interval},
    )
    with pytest.raises(NonFiniteGradient, match=r"^step \d+: .*lower the learning rates"):
        train(config)
    status = json.loads(Path(config.resolved_run_dir, "status.json").read_text())
    assert status["state"] == "failed"
    assert status["error"].startswith("Diverged: step ")
    if store.latest(config.resolved_run_dir) is not None:
        assert not [name for name, tensor in final_state(config).items() if not bool(tensor.isfinite().all())]


def test_a_state_that_went_bad_between_records_is_not_saved(make_config, monkeypatch) -> None:
    config = make_config(**{"track.interval_steps": 100, "checkpoint.interval_steps": 2})

    def poisoning(parts, step, sequences, **flags):
        result = take_step(parts, step, sequences, **flags)
        if step == 3:
            with torch.no_grad():
                parts.model.model.norm.weight[0] = math.inf
        return result

    monkeypatch.setattr(loop, "take_step", poisoning)
    with pytest.raises(Diverged, match=r"step 4: model\.norm\.weight is not finite after the update"):
        train(config)
    saved = store.latest(config.resolved_run_dir)
    assert saved is not None
    assert saved.name == "step_00000002"


def test_a_stop_on_one_rank_is_known_to_all(make_config, run_ranks) -> None:
    def one_rank(rank, size):
        config = make_config()
        parts = build(config, process.start(config.dist, "cpu"), {})
        first = take_step(parts, 0, 0, measure=False, stop=False)
        return first.stop, take_step(parts, 1, 6, measure=False, stop=rank == 1).stop

    assert run_ranks(one_rank, 3, join=False) == [(False, True)] * 3


def test_measuring_is_left_out_of_the_step_time(make_config, monkeypatch) -> None:
    import time

    from muonlm.train import step

    class Slow(step.UpdateNorms):
        def __enter__(self):
            time.sleep(0.5)
            return super().__enter__()

    monkeypatch.setattr(step, "UpdateNorms", Slow)
    config = make_config()
    parts = build(config, process.start(config.dist, "cpu"), {})
    take_step(parts, 0, 0, measure=False, stop=False)
    result = take_step(parts, 1, 6, measure=True, stop=False)
    assert 0 < result.optimizer_s < result.seconds < 0.5
    assert set(result.updates.by_group) == {"embedding", "hidden", "norm", "head"}
