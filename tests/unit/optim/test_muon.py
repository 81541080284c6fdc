"""One-process Muon against torch.optim.Muon and the formulas of its docstring."""

import math
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.optim.muon import Muon, update_scale
from muonlm_kernels import newton_schulz, polar_factor
from muonlm_kernels.oracle import noise_leak

SHAPES = [(64, 64), (128, 48), (48, 128), (1, 32), (33, 17), (256, 64)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.05) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients that depend on the weights, so that a wrong step is carried on into the next."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 0.01 + 0.1 * param.detach()


@pytest.mark.parametrize(("scaling", "adjust"), [("jordan", "original"), ("rms_adamw", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon_over_20_steps(scaling, adjust, nesterov):
    ours_params, peer_params = parameters(), parameters()
    common = {"lr": 0.02, "momentum": 0.95, "nesterov": nesterov, "weight_decay": 0.1}
    ours = Muon(ours_params, **common, scaling=scaling, coefficients="jordan")
    peer = torch.optim.Muon(peer_params, **common, adjust_lr_fn=adjust, ns_coefficients=(3.4445, -4.7750, 2.0315))
    start = [p.detach().clone() for p in ours_params]
    for step in range(20):
        for params, optimizer in ((ours_params, ours), (peer_params, peer)):
            set_gradients(params, step)
            optimizer.step()
    for mine, theirs, initial in zip(ours_params, peer_params, start, strict=True):
        moved = (theirs - initial).norm()
        # Both round the iterates to bf16 (8 bits); the rounding errors of 20 steps average out below one of them.
        assert ((mine - theirs).norm() / moved).item() < 2**-6


def test_one_step_is_the_formula():
    weight = nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5, scaling="spectral", dtype=torch.float32)
    momentum = torch.zeros_like(before)
    for step in range(3):
        grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step + 1))
        weight.grad = grad.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * grad
        orthogonal = newton_schulz(0.1 * grad + 0.9 * momentum, dtype=torch.float32)
        before = (1 - 0.1 * 0.5) * before - 0.1 * math.sqrt(24 / 40) * orthogonal
        torch.testing.assert_close(weight.detach(), before, atol=1e-5, rtol=1e-5)


def test_converged_iteration_takes_the_exact_polar_step():
    weight = nn.Parameter(torch.zeros(16, 32))
    weight.grad = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, weight_decay=0.0, scaling="jordan", steps=10, dtype=torch.float32).step()
    torch.testing.assert_close(-weight.detach().double(), polar_factor(weight.grad), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("scaling", "shape", "expected"),
    [
        ("jordan", (64, 16), 2.0),
        ("jordan", (16, 64), 1.0),
        ("spectral", (16, 64), 0.5),
        ("rms_adamw", (16, 64), 1.6),
    ],
)
def test_update_scale(scaling, shape, expected):
    assert update_scale(scaling, *shape) == pytest.approx(expected)


def test_rms_adamw_gives_the_rms_of_adamw():
    for shape in [(128, 128), (384, 128), (128, 384)]:
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=1.0, weight_decay=0.0, scaling="rms_adamw", steps=10, dtype=torch.float32).step()
        assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.01)


def test_compensated_keeps_noise_out_of_an_update_of_low_rank():
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(160, 8, generator=generator) @ torch.randn(8, 320, generator=generator)
    leaks = []
    for compensated in (False, True):
        weight = nn.Parameter(torch.zeros(160, 320))
        weight.grad = grad.clone()
        Muon([weight], lr=1.0, weight_decay=0.0, dtype=torch.bfloat16, compensated=compensated).step()
        leaks.append(noise_leak(weight.detach(), grad, rank=8))
    assert leaks[0] > 0.15
    assert leaks[1] < 0.05


def test_adamw_groups_equal_torch_adamw():
    mine = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), nn.Parameter(torch.ones(5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours = Muon([{"params": mine, "rule": "adamw", "lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}])
    peer = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    for step in range(5):
        for params, optimizer in ((mine, ours), (theirs, peer)):
            for param in params:
                param.grad = torch.sin(param.detach() * (step + 1))
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_parameter_without_gradient_is_left_alone():
    first, second = parameters()[:2]
    before = second.detach().clone()
    optimizer = Muon([first, second], weight_decay=0.1)
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, before)
    assert not optimizer.state[second]["momentum_buffer"].any()
    assert optimizer.state[first]["momentum_buffer"].any()


def test_state_dict_round_trip_continues_bit_for_bit():
    straight, resumed = parameters(), parameters()
    a, b = Muon(straight), Muon(resumed)
    for step in range(2):
        for params, optimizer in ((straight, a), (resumed, b)):
            set_gradients(params, step)
            optimizer.step()
    again = Muon(resumed)
    again.load_state_dict(b.state_dict())
    for params, optimizer in ((straight, a), (resumed, again)):
        set_gradients(params, 2)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))


def test_state_is_allocated_at_construction():
    params = parameters()
    optimizer = Muon([{"params": params}, {"params": [nn.Parameter(torch.ones(3))], "rule": "adamw"}])
    assert set(optimizer.state_dict()["state"][0]) == {"momentum_buffer"}
    assert set(optimizer.state_dict()["state"][len(params)]) == {"step", "exp_avg", "exp_avg_sq"}


def test_refuses_what_is_no_matrix():
    with pytest.raises(UserError, match=r"bias \(3,\).*rule='adamw'"):
        Muon([("weight", nn.Parameter(torch.ones(2, 2))), ("bias", nn.Parameter(torch.ones(3)))])
    with pytest.raises(UserError, match="unknown rule 'sgd'"):
        Muon([{"params": parameters(), "rule": "sgd"}])


def test_a_group_added_later_is_trained():
    first, second = parameters()[:2]
    optimizer = Muon([first])
    set_gradients([first, second], 0)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    before = second.detach().clone()
    optimizer.step()
    assert not torch.equal(second, before)


def test_adamw_takes_any_layout_in_memory():
    """The fused kernel walks straight through memory, so parameters and gradients must lie alike, and dense."""
    base = torch.linspace(-1, 1, 48).view(6, 8)
    untouched = base[:, 1::2].clone()
    odd = [
        nn.Parameter(base[:, ::2]),
        nn.Parameter(torch.linspace(0, 1, 12).view(3, 4).t()),
        nn.Parameter(torch.ones(3, 4)),
    ]
    plain = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in odd]
    ours = Muon([{"params": odd, "rule": "adamw", "lr": 0.01, "weight_decay": 0.1}])
    peer = torch.optim.AdamW(plain, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(3):
        for number, (mine, theirs) in enumerate(zip(odd, plain, strict=True)):
            theirs.grad = torch.sin(theirs.detach() * (step + 1 + number))
            mine.grad = theirs.grad.t().contiguous().t()
        ours.step()
        peer.step()
    for mine, theirs in zip(odd, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-6)
    assert torch.equal(base[:, 1::2], untouched)


def test_norms_of_a_failed_check_are_not_used():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([("w", weight)])
    weight.grad = torch.ones(4, 4)
    optimizer.clip_gradients()
    weight.grad = torch.full((4, 4), float("nan"))
    for attempt in (optimizer.clip_gradients, optimizer.step):
        with pytest.raises(UserError, match="non-finite gradient in w"):
            attempt()
    assert not optimizer.state[weight]["momentum_buffer"].any()


def test_refuses_groups_of_one_name_and_impossible_numbers():
    first, second = parameters()[:2]
    with pytest.raises(UserError, match="two parameter groups are named '0'"):
        Muon([{"params": [first]}, {"params": [second], "name": "0"}])
    for options in (
        {"lr": -1.0},
        {"lr": math.nan},
        {"momentum": 1.5},
        {"betas": (1.0, 0.9)},
        {"eps": -1.0},
        {"depth": -1},
    ):
        with pytest.raises(UserError, match=next(iter(options))):
            Muon([first], **options)


def calls_of_a_step(experts: int) -> Counter[str]:
    """Python functions and methods of torch that one step calls, after the first one, by name."""
    shapes = [(experts, 16, 8), (experts, 16, 8), (experts, 8, 16)] * 3
    optimizer = Muon([nn.Parameter(torch.randn(shape)) for shape in shapes], dtype=torch.float32)
    counts: Counter[str] = Counter()

    def count(frame, event: str, argument) -> None:
        if event in ("call", "c_call"):
            counts[argument.__name__ if event == "c_call" else frame.f_code.co_qualname] += 1

    for step in range(2):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn_like(param)
        sys.setprofile(count if step else None)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    return counts


def test_a_step_costs_the_host_no_more_with_more_experts() -> None:
    few, many = calls_of_a_step(4), calls_of_a_step(64)
    assert few["Muon.step"] == few["newton_schulz"] / 2 == 1
    assert many == few
