"""Schedules, clipping and update norms."""

import math

import pytest
import torch
from torch import nn

from muonlm.config.schema import ScheduleConfig
from muonlm.optim.gradients import NonFiniteGradient
from muonlm.optim.measure import UpdateNorms
from muonlm.optim.muon import Muon
from muonlm.optim.schedules import lr_multiplier, set_learning_rates


def multipliers(num_steps: int, **config) -> list[float]:
    return [lr_multiplier(ScheduleConfig(**config), step, num_steps) for step in range(num_steps)]


def test_wsd():
    values = multipliers(10, kind="wsd", warmup_steps=2, decay_fraction=0.4)
    assert values == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_linear_and_final_ratio():
    values = multipliers(5, kind="linear", warmup_steps=1, final_ratio=0.2)
    assert values == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4])


def test_cosine_is_symmetric_about_its_middle():
    values = multipliers(8, kind="cosine", warmup_steps=0)
    assert values[0] == 1
    assert values[4] == pytest.approx(0.5)
    assert values[2] + values[6] == pytest.approx(1)


def test_no_warmup_and_no_decay_is_constant():
    assert multipliers(4, kind="wsd", warmup_steps=0, decay_fraction=0.0) == [1.0] * 4


def test_every_step_moves():
    for kind in ("wsd", "cosine", "linear"):
        assert all(0 < value <= 1 for value in multipliers(7, kind=kind, warmup_steps=3))


def optimizer_with(hidden_grad: float, aux_grad: float) -> tuple[Muon, nn.Parameter, nn.Parameter]:
    hidden, aux = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(4))
    hidden.grad, aux.grad = torch.full((2, 2), hidden_grad), torch.full((4,), aux_grad)
    optimizer = Muon(
        [
            {"params": [("w", hidden)], "name": "hidden", "base_lr": 0.1},
            {"params": [("b", aux)], "name": "norm", "rule": "adamw", "base_lr": 0.2},
        ]
    )
    return optimizer, hidden, aux


def test_clip_leaves_muon_alone():
    optimizer, hidden, aux = optimizer_with(3.0, 2.0)
    norms = optimizer.clip_gradients(1.0)
    assert norms.by_group == pytest.approx({"hidden": 6.0, "norm": 4.0})
    assert norms.total == pytest.approx(math.sqrt(52))
    assert norms.clip_factor == pytest.approx(0.25)
    assert torch.equal(hidden.grad, torch.full((2, 2), 3.0))
    assert aux.grad.norm().item() == pytest.approx(1.0)


def test_clip_zero_and_small_gradients_change_nothing():
    for grad, limit in ((3.0, 0.0), (0.1, 1.0)):
        optimizer, _, aux = optimizer_with(3.0, grad)
        assert optimizer.clip_gradients(limit).clip_factor == 1.0
        assert torch.equal(aux.grad, torch.full((4,), grad))


def test_non_finite_gradient_is_named_before_anything_moves():
    optimizer, hidden, aux = optimizer_with(float("nan"), 2.0)
    with pytest.raises(NonFiniteGradient, match=r"non-finite gradient in w$"):
        optimizer.clip_gradients(1.0)
    assert torch.equal(aux.grad, torch.full((4,), 2.0))
    assert torch.equal(hidden, torch.ones(2, 2))


def test_update_norms_measure_the_step():
    optimizer, hidden, aux = optimizer_with(1.0, 1.0)
    before = hidden.detach().clone(), aux.detach().clone()
    with UpdateNorms(optimizer) as norms:
        optimizer.step()
    assert norms.by_group["hidden"] == pytest.approx((hidden - before[0]).norm().item(), rel=1e-5)
    assert norms.by_group["norm"] == pytest.approx((aux - before[1]).norm().item(), rel=1e-5)
    assert norms.rms_by_group["norm"] == pytest.approx(norms.by_group["norm"] / 2)


def test_set_learning_rates():
    optimizer, *_ = optimizer_with(1.0, 1.0)
    set_learning_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
