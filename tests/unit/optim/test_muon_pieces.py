"""What Muon takes for one matrix: fused projections, heads, expert stacks, kernels; and how far each of them moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.optim.muon import Muon
from muonlm.optim.pieces import Split
from muonlm.optim.scaling import SCALINGS, convert_learning_rate, update_rms

Parts = Callable[[torch.Tensor], list[torch.Tensor]]

HEADS, KV_HEADS, WIDTH, MODEL = 4, 2, 6, 20
# name -> (shape, split, the matrices that it consists of, cut out by hand)
FUSED: dict[str, tuple[tuple[int, ...], Split, Parts]] = {
    "blocked qkv": (
        ((HEADS + 2 * KV_HEADS) * WIDTH, MODEL),
        Split((HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH)),
        lambda w: [w[:24], w[24:36], w[36:]],
    ),
    "qkv interleaved by key head": (
        ((HEADS + 2 * KV_HEADS) * WIDTH, MODEL),
        Split((HEADS // KV_HEADS * WIDTH, WIDTH, WIDTH), groups=KV_HEADS),
        lambda w: [
            torch.cat([w[0:12], w[24:36]]),
            torch.cat([w[12:18], w[36:42]]),
            torch.cat([w[18:24], w[42:48]]),
        ],
    ),
    "gate and up": ((64, MODEL), Split((32, 32)), lambda w: [w[:32], w[32:]]),
    "a matrix for each head": (
        (HEADS * WIDTH, MODEL),
        Split((WIDTH,), groups=HEADS, separate_groups=True),
        lambda w: [w[0:6], w[6:12], w[12:18], w[18:24]],
    ),
    "a matrix for each head of an output projection": (
        (MODEL, HEADS * WIDTH),
        Split((WIDTH,), groups=HEADS, separate_groups=True, dim=1),
        lambda w: [w[:, 0:6], w[:, 6:12], w[:, 12:18], w[:, 18:24]],
    ),
    "gate and up of experts": (
        (3, 32, MODEL),
        Split((24, 8)),
        lambda w: [part for e in range(3) for part in (w[e, :24], w[e, 24:])],
    ),
}


def stepped(weights: list[torch.Tensor], grads: list[list[torch.Tensor]], **group: Any) -> list[torch.Tensor]:
    """The weights after a step for each list of gradients; weights and momenta."""
    params = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Muon([{"params": params, **group}], lr=0.05, momentum=0.9, dtype=torch.float32)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in params] + [optimizer.state[p]["momentum_buffer"] for p in params]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", FUSED)
def test_fused_weights_are_trained_as_separate_ones(kind, scaling) -> None:
    shape, split, parts = FUSED[kind]
    generator = torch.Generator().manual_seed(0)
    weight, *grads = (torch.randn(shape, generator=generator) for _ in range(4))
    fused = stepped([weight], [[g] for g in grads], scaling=scaling, split=split)
    separate = stepped(parts(weight), [parts(g) for g in grads], scaling=scaling)
    for mine, theirs in zip(parts(fused[0]) + parts(fused[1]), separate, strict=True):
        assert ((mine - theirs).norm() / theirs.norm()).item() <= 1e-6
    whole = stepped([weight], [[g] for g in grads], scaling=scaling)
    assert (fused[0] - whole[0]).norm() > 0.003 * whole[0].norm()


def test_an_expert_stack_is_a_matrix_for_each_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, *grads = (torch.randn(5, 24, 16, generator=generator) for _ in range(3))
    stack = stepped([weight], [[g] for g in grads])
    separate = stepped(list(weight), [list(g) for g in grads])
    assert all(torch.equal(a, b) for a, b in zip([*stack[0], *stack[1]], separate, strict=True))


@pytest.mark.parametrize("shape", [(12, 4, 3, 3), (8, 5, 3), (6, 2, 2, 2, 2), (10, 14)])
def test_a_kernel_is_one_matrix(shape) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, *grads = (torch.randn(shape, generator=generator) for _ in range(3))
    kernel = stepped([weight], [[g] for g in grads], convolution=True)
    matrix = stepped([weight.flatten(1)], [[g.flatten(1)] for g in grads])
    assert all(torch.equal(a.flatten(1), b) for a, b in zip(kernel, matrix, strict=True))


def test_a_kernel_in_another_memory_format_is_the_same_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(12, 4, 3, 3, generator=generator) for _ in range(2))
    plain = stepped([weight], [[grad]], convolution=True)[0]
    weight, grad = (t.to(memory_format=torch.channels_last) for t in (weight, grad))
    assert torch.equal(stepped([weight], [[grad]], convolution=True)[0], plain)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 128), (33, 70), (2, 100)])
def test_measured_rms_is_that_of_the_formula(shape, scaling) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, weight_decay=0.0, scaling=scaling, coefficients="quintic").step()
    rms = weight.detach().square().mean().sqrt().item()
    rows, cols = shape
    longer = math.sqrt(max(rows, cols))
    expected = {"jordan": math.sqrt(max(1, rows / cols)) / longer, "spectral": math.sqrt(rows / cols) / longer}
    assert update_rms(scaling, *shape) == pytest.approx(expected.get(scaling, 0.2))
    assert rms == pytest.approx(update_rms(scaling, *shape), rel=0.05)


@pytest.mark.parametrize("target", [*SCALINGS, "adamw"])
@pytest.mark.parametrize("source", [*SCALINGS, "adamw"])
@pytest.mark.parametrize("shape", [(96, 32), (32, 128)])
def test_a_converted_learning_rate_moves_weights_as_far(shape, source, target) -> None:
    converted = convert_learning_rate(0.02, source, target, shape)
    assert convert_learning_rate(converted, target, source, shape) == pytest.approx(0.02)
    assert source != target or converted == pytest.approx(0.02)
    moved = []
    for scaling, lr in ((source, 0.02), (target, converted)):
        if scaling == "adamw":
            moved.append(0.2 * lr)
            continue
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=lr, weight_decay=0.0, scaling=scaling, coefficients="quintic", dtype=torch.float32).step()
        moved.append(weight.detach().square().mean().sqrt().item())
    assert moved[1] == pytest.approx(moved[0], rel=0.03)


@pytest.mark.parametrize(
    ("shape", "group", "message"),
    [
        ((4, 3, 3, 3), {}, r"convolution=True.*w \(4, 3, 3, 3\)"),
        ((7,), {"convolution": True}, r"w \(7,\).*rule='adamw'"),
        ((), {}, r"w \(\)"),
        ((6, 4), {"split": Split((4, 4))}, r"w: a split of 1 x \(4, 4\) covers 8 of the 6 rows"),
        ((6, 4), {"split": Split((3,), groups=2, dim=1)}, "covers 6 of the 4 columns"),
        ((6, 4), {"scaling": "frobenius"}, "unknown scaling 'frobenius'; known: jordan"),
        ((6, 4), {"momentum_form": "heavy"}, "unknown momentum_form 'heavy'"),
        ((6, 4), {"rule": "lion"}, "unknown rule 'lion'"),
    ],
)
def test_what_is_refused_is_named_and_leaves_the_optimizer_as_it_was(shape, group, message) -> None:
    first = nn.Parameter(torch.eye(4))
    optimizer = Muon([("first", first)])
    with pytest.raises(UserError, match=message):
        optimizer.add_param_group({"params": [("w", nn.Parameter(torch.ones(shape)))], **group})
    assert len(optimizer.param_groups) == 1
    first.grad = torch.eye(4)
    optimizer.step()
    assert not torch.equal(first, torch.eye(4))


def test_integers_and_unknown_coefficients_are_refused() -> None:
    with pytest.raises(UserError, match=r"w \(2, 2\)"):
        Muon([("w", nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False))])
    with pytest.raises(UserError, match="unknown coefficient set 'cubic'"):
        Muon([nn.Parameter(torch.eye(2))], coefficients="cubic")
    with pytest.raises(UserError, match="non_finite"):
        Muon([nn.Parameter(torch.eye(2))], non_finite="ignore")  # type: ignore[arg-type]


def test_scales_of_pieces_are_their_own() -> None:
    """A fused (4, 1) weight in two halves has the jordan scale sqrt(2) of each half, not 2."""
    weight = nn.Parameter(torch.zeros(4, 1))
    weight.grad = torch.tensor([[1.0], [1.0], [3.0], [0.0]])
    split = Split((2,), groups=2, separate_groups=True)
    options = {"lr": 1.0, "weight_decay": 0.0, "scaling": "jordan", "steps": 10, "dtype": torch.float32}
    Muon([{"params": [weight], "split": split}], **options).step()
    expected = torch.tensor([[1.0], [1.0], [math.sqrt(2)], [0.0]])
    torch.testing.assert_close(-weight.detach(), expected, atol=1e-4, rtol=0)
