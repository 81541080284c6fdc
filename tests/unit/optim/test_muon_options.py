"""What Muon's options mean: forms of momentum, precision of its state, decay, clipping, accumulation, loss scaling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.optim import updates
from muonlm.optim.gradients import NonFiniteGradient
from muonlm.optim.muon import Muon
from muonlm_kernels import newton_schulz

SHAPES = [(24, 24), (48, 16), (16, 40), (1, 8)]


def parameters(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def trained(steps: int = 4, scale: float = 1.0, kept: torch.dtype = torch.float32, **options: Any) -> Muon:
    """An optimizer after some steps in fp32; its one group has the weights."""
    params = parameters(dtype=kept)
    optimizer = Muon(params, **{"lr": 0.02, "momentum": 0.9, "dtype": torch.float32, **options})
    for step in range(steps):
        set_gradients(params, step, scale)
        optimizer.step()
    return optimizer


def weights(optimizer: Muon) -> list[torch.Tensor]:
    return [param.detach() for group in optimizer.param_groups for param in group["params"]]


def momenta(optimizer: Muon) -> list[torch.Tensor]:
    return [optimizer.state[param]["momentum_buffer"] for param in optimizer.param_groups[0]["params"]]


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Of the norms of the differences, relative to the norms of `second`."""
    pairs = zip(first, second, strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sum_is_ema_with_another_scale_of_the_state(nesterov) -> None:
    ema, sums = (trained(nesterov=nesterov, momentum_form=form) for form in ("ema", "sum"))
    assert largest_difference(weights(sums), weights(ema)) < 1e-5
    assert largest_difference([(1 - 0.9) * m for m in momenta(sums)], momenta(ema)) < 1e-6


@pytest.mark.parametrize("form", ["ema", "sum"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_what_is_orthogonalized(form, nesterov) -> None:
    mu, share = 0.8, 0.2 if form == "ema" else 1.0
    weight = nn.Parameter(torch.zeros(12, 20))
    optimizer = Muon(
        [weight],
        lr=1.0,
        momentum=mu,
        weight_decay=0.0,
        scaling="jordan",
        dtype=torch.float32,
        nesterov=nesterov,
        momentum_form=form,
    )
    first, second = (torch.randn(12, 20, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    expected = torch.zeros(12, 20)
    momentum = torch.zeros(12, 20)
    for grad in (first, second):
        weight.grad = grad.clone()
        optimizer.step()
        momentum = mu * momentum + share * grad
        expected -= newton_schulz(share * grad + mu * momentum if nesterov else momentum, dtype=torch.float32)
    torch.testing.assert_close(weight.detach(), expected, atol=2e-5, rtol=0)


def test_bfloat16_momentum_stays_bfloat16_and_close_to_float32() -> None:
    exact, short = trained(6), trained(6, momentum_dtype=torch.bfloat16)
    assert all(m.dtype == torch.bfloat16 for m in momenta(short))
    assert 0 < largest_difference(momenta(short), momenta(exact)) < 2**-7
    assert largest_difference(weights(short), weights(exact)) < 5e-3
    saved = copy.deepcopy(short.state_dict())
    assert all(state["momentum_buffer"].dtype == torch.bfloat16 for state in saved["state"].values())
    resumed = trained(0, momentum_dtype=torch.bfloat16)
    resumed.load_state_dict(saved)
    for mine, theirs in zip(momenta(resumed), momenta(short), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("form", ["ema", "sum"])
@pytest.mark.parametrize("at_a_time", [1, 700, 1500])
def test_momentum_does_not_depend_on_how_much_is_computed_at_a_time(form, at_a_time, monkeypatch) -> None:
    options = {"momentum_form": form, "momentum_dtype": torch.bfloat16}
    together = trained(**options)
    monkeypatch.setattr(updates, "_NUMEL_AT_A_TIME", at_a_time)
    apart = trained(**options)
    for mine, theirs in zip(momenta(apart) + weights(apart), momenta(together) + weights(together), strict=True):
        assert torch.equal(mine, theirs)


def test_float32_momentum_of_bfloat16_weights_survives_a_resume() -> None:
    """torch casts loaded state to the dtype of the parameter, which would drop 16 of its bits."""
    options = {"kept": torch.bfloat16, "momentum_dtype": torch.float32}
    before, resumed = trained(**options), trained(0, **options)
    resumed.load_state_dict(copy.deepcopy(before.state_dict()))
    for mine, theirs in zip(momenta(resumed), momenta(before), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("cautious", [False, True])
def test_decay(cautious) -> None:
    """Plain decay shrinks every weight, cautious decay only those that the update moves towards zero."""
    plain, decayed = (trained(1, weight_decay=wd, cautious=cautious, scaling="spectral") for wd in (0.0, 0.5))
    for initial, without, with_decay in zip(parameters(), weights(plain), weights(decayed), strict=True):
        update = initial.detach() - without  # lr * scale * O
        is_decayed = (update * initial > 0) if cautious else torch.ones_like(update, dtype=torch.bool)
        expected = without - 0.02 * 0.5 * initial.detach() * is_decayed
        torch.testing.assert_close(with_decay, expected, atol=1e-7, rtol=1e-6)
        assert not cautious or is_decayed.numel() == 8 or 0 < is_decayed.float().mean() < 1


def with_adamw(**options: Any) -> tuple[list[nn.Parameter], Muon]:
    params = [*parameters(), nn.Parameter(torch.ones(6))]
    groups = [{"params": params[:-1], "name": "hidden"}, {"params": params[-1:], "rule": "adamw", "name": "rest"}]
    return params, Muon(groups, lr=0.02, dtype=torch.float32, **options)


@pytest.mark.parametrize("threshold", [1e-6, 0.1, 1e6])
def test_clipping_changes_no_muon_step(threshold) -> None:
    results = []
    for grad_clip in (0.0, threshold):
        params, optimizer = with_adamw(grad_clip=grad_clip)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        results.append((weights(optimizer), optimizer.state[params[-1]]["exp_avg"]))
    (free, free_adam), (clipped, clipped_adam) = results
    assert all(torch.equal(a, b) for a, b in zip(free[:-1], clipped[:-1], strict=True))
    assert torch.equal(free_adam, clipped_adam) == (threshold == 1e6)


def test_gradients_accumulated_over_micro_batches_are_those_of_the_batch() -> None:
    results = []
    batch = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    for num_parts in (1, 4):
        model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 16, bias=False))
        for param, value in zip(model.parameters(), parameters([(32, 16), (16, 32)]), strict=True):
            param.data.copy_(value)
        optimizer = Muon(model.parameters(), lr=0.02, dtype=torch.float32)
        for _ in range(3):
            optimizer.zero_grad()
            for part in batch.chunk(num_parts):
                ((model(part) - part).square().mean() / num_parts).backward()
            optimizer.step()
        results.append(weights(optimizer))
    assert largest_difference(results[1], results[0]) <= 1e-6


def scaled_training(scale: float | None, skipped: int | None, unscale: bool = False) -> tuple[list[torch.Tensor], Muon]:
    """Four steps under a GradScaler, whose scale halves when a gradient overflows; None: without, and one left out."""
    params, optimizer = with_adamw(grad_clip=0.5, non_finite="skip" if unscale else "raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=1000, enabled=scale is not None)
    for step in range(4):
        set_gradients(params, step, scaler.scale(torch.ones(())).item())
        if step == skipped and scale is None:
            continue
        if step == skipped:
            params[1].grad[0, 0] = torch.inf
            before = copy.deepcopy((weights(optimizer), optimizer.state_dict()["state"]))
        if unscale:
            scaler.unscale_(optimizer)
            optimizer.clip_gradients(0.5)
        scaler.step(optimizer)
        scaler.update()
        if step == skipped:
            torch.testing.assert_close((weights(optimizer), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    return weights(optimizer) + momenta(optimizer), optimizer


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("skipped", [None, 2])
def test_loss_scale_does_not_matter_and_overflow_skips_a_step(skipped, unscale) -> None:
    expected, _ = scaled_training(None, skipped)
    mine, optimizer = scaled_training(2.0**12, skipped, unscale)
    assert largest_difference(mine, expected) <= 1e-6
    assert optimizer.num_skipped == (skipped is not None)


def test_what_a_loss_scaler_has_found_skips_a_step() -> None:
    """Also where it found it in gradients that this optimizer does not have."""
    params, optimizer = with_adamw()
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.num_skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(weights(optimizer), before, strict=True))


def test_clipping_gradients_that_still_carry_the_loss_scale_is_refused() -> None:
    params, optimizer = with_adamw()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    set_gradients(params, 0, scaler.scale(torch.ones(())).item())
    optimizer.clip_gradients(1.0)
    with pytest.raises(UserError, match="unscale_"):
        scaler.step(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-4, 1e8, 1e30])
def test_scale_of_gradients_does_not_matter(scale, dtype) -> None:
    reference, scaled = (
        trained(
            2, s, lr=1.0, weight_decay=0.0, momentum_form="sum", scaling="jordan", coefficients="quintic", dtype=dtype
        )
        for s in (1.0, scale)
    )
    for initial, a, b in zip(parameters(), weights(scaled), weights(reference), strict=True):
        assert (a - initial).norm().item() == pytest.approx((b - initial).norm().item(), rel=0.01)


def test_zero_gradient_gives_no_update() -> None:
    for scale in (0.0, -0.0):
        optimizer = trained(2, scale, weight_decay=0.0, scaling="jordan")
        assert all(torch.equal(a, b) for a, b in zip(weights(optimizer), parameters(), strict=True))
        assert not any(m.any() for m in momenta(optimizer))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_step_with_a_gradient_that_is_not_finite(value) -> None:
    """Skipped, it counts and leaves no trace; raised, it says which parameter and leaves none either."""
    runs = {}
    for mode in ("skip", "raise", "absent"):
        params, optimizer = with_adamw(non_finite="raise" if mode == "absent" else mode)
        for step in range(4):
            set_gradients(params, step)
            if step == 2:
                params[1].grad[3, 1] = value
                if mode == "skip":
                    optimizer.step()
                elif mode == "raise":
                    with pytest.raises(NonFiniteGradient, match=r"non-finite gradient in group hidden, number 1$"):
                        optimizer.step()
            else:
                optimizer.step()
        runs[mode] = optimizer
    assert [runs[mode].num_skipped for mode in ("skip", "raise", "absent")] == [1, 0, 0]
    for mode in ("skip", "raise"):
        mine, clean = (runs[each].state_dict()["state"] for each in (mode, "absent"))
        torch.testing.assert_close(mine, clean, rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(weights(runs[mode]), weights(runs["absent"]), strict=True))
