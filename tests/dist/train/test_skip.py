"""`optim.non_finite = "skip"`: a step whose numbers are not finite is left out, on all ranks, and told."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from muonlm.dist import process
from muonlm.optim.rules_table import rules_summary
from muonlm.track.metrics import read_metrics
from muonlm.train import loop
from muonlm.train.loop import train
from muonlm.train.setup import build
from muonlm.train.step import Diverged, take_step

SKIP = {"optim.non_finite": "skip"}


def _state(parts) -> list[torch.Tensor]:
    tensors = [t for state in parts.optimizer.state.values() for t in state.values()]
    return copy.deepcopy([*parts.model.state_dict().values(), *tensors])


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_all_ranks_leave_the_step_out_and_go_on(make_config, run_ranks, kind: str, bad: str) -> None:
    def one_rank(rank, size):
        config = make_config(**{"optim.kind": kind}, **SKIP)
        parts = build(config, process.start(config.dist, "cpu"), {})
        poison = [False]
        if bad == "gradient":
            name = "model.layers.1.mlp.up_proj.weight"
            dict(parts.model.named_parameters())[name].register_hook(
                lambda grad: grad * math.nan if poison[0] and rank == 1 else grad
            )
        else:  # finite gradients, and a loss that is not
            forward = parts.model.forward
            parts.model.forward = lambda *args: forward(*args) + (math.inf if poison[0] and rank == 1 else 0.0)
        results = []
        for step in range(3):
            before = _state(parts)
            poison[0] = step == 1
            result = take_step(parts, step, step * 6, measure=step == 1, stop=False)
            same = all(torch.equal(a, b) for a, b in zip(before, _state(parts), strict=True))
            results.append((result.is_skipped, same))
        return results

    expected = [(False, False), (True, True), (False, False)]
    assert run_ranks(one_rank, 2, join=False) == [expected] * 2


def test_parameters_that_are_not_finite_stop_the_run_all_the_same(make_config) -> None:
    config = make_config(**SKIP)
    parts = build(config, process.start(config.dist, "cpu"), {})
    with torch.no_grad():
        parts.model.model.norm.weight[0] = math.nan
    with pytest.raises(Diverged, match=r"step 4: model\.norm\.weight is not finite after the update"):
        take_step(parts, 4, 0, measure=False, stop=False)


def test_what_was_skipped_is_recorded(make_config, monkeypatch) -> None:
    config = make_config(**SKIP, **{"loop.steps": 10, "track.interval_steps": 3, "eval.interval_steps": 0})

    def poisoning(parts, step, sequences, **flags):
        param = parts.model.model.norm.weight
        handle = param.register_hook(lambda grad: grad * (math.nan if step in (3, 5) else 1.0))
        result = take_step(parts, step, sequences, **flags)
        handle.remove()
        return result

    monkeypatch.setattr(loop, "take_step", poisoning)
    assert train(config).step == 10
    records = read_metrics(config.resolved_run_dir)
    assert [r["step"] for r in records if r.get("event") == "skipped"] == [4, 6]
    trained = {r["step"]: r.get("skipped_steps", 0) for r in records if r["kind"] == "train"}
    assert trained == {1: 0, 3: 0, 9: 2, 10: 0}, "step 6 was due, and skipped"


def test_the_rules_are_shown_and_kept(make_config, capsys) -> None:
    config = make_config(**{"loop.steps": 4, "schedule.warmup_steps": 0, "track.console": True})
    train(config)
    table = Path(config.resolved_run_dir, "rules.txt").read_text()
    shown = capsys.readouterr().out
    assert rules_summary(table) + f"\neach parameter and matrix: {config.resolved_run_dir}/rules.txt\n" in shown
    assert "model.layers.0.mlp.up_proj.weight 64x32: " in table.split("exchange plan: 14 matrices on 1 rank")[1]
