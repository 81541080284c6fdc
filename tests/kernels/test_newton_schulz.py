"""The iteration against the exact polar factor, and against input that breaks the usual code."""

import pytest
import torch

from muonlm_kernels import COEFFICIENTS, coefficients, matmul_flops, newton_schulz, polar_factor

# Largest relative distance to the polar factor on a Gaussian matrix of aspect 4 in fp32 (measured .153, .017, .088).
GAUSSIAN_ERROR = {"jordan": 0.16, "quintic": 0.02, "polar_express": 0.095}


def relative_error(estimate: torch.Tensor, exact: torch.Tensor) -> float:
    return ((estimate.double() - exact).norm() / exact.norm()).item()


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)])
def test_error_against_polar_factor(name, shape):
    grad = gaussian(*shape)
    exact = polar_factor(grad)
    assert relative_error(newton_schulz(grad, coefficients=name, dtype=torch.float32), exact) < GAUSSIAN_ERROR[name]
    assert relative_error(newton_schulz(grad, coefficients=name), exact) < GAUSSIAN_ERROR[name] + 0.02


def test_more_steps_converge():
    grad = gaussian(64, 96)
    errors = [
        relative_error(newton_schulz(grad, steps=steps, dtype=torch.float32), polar_factor(grad)) for steps in (3, 5, 9)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (5, 5), (33, 65), (3, 17, 9), (2, 9, 17)])
def test_shapes_and_strides_agree(shape):
    grad = gaussian(*shape)
    plain = newton_schulz(grad, dtype=torch.float32)
    assert plain.shape == grad.shape
    strided = grad.repeat_interleave(2, dim=-1)[..., ::2]
    assert not strided.is_contiguous() or strided.shape[-1] == 1
    assert torch.equal(newton_schulz(strided, dtype=torch.float32), plain)
    assert torch.allclose(newton_schulz(grad.mT, dtype=torch.float32), plain.mT, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 4), (2, 0, 3)])
def test_empty(shape):
    assert newton_schulz(torch.empty(shape)).shape == shape
    assert newton_schulz([]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stack_list_and_loop_agree(dtype):
    stack = gaussian(6, 48, 80)
    batched = newton_schulz(stack, dtype=dtype)
    listed = newton_schulz(list(stack), dtype=dtype)
    assert isinstance(listed, list)
    assert len(listed) == 6
    for one, from_stack, from_list in zip(stack, batched, listed, strict=True):
        assert torch.equal(from_list, from_stack)
        single = newton_schulz(one, dtype=dtype)
        assert torch.allclose(single.float(), from_stack.float(), atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("exponent", [-35, -20, -7, 0, 12, 20, 35])
def test_scale_invariant(exponent):
    grad = gaussian(64, 128)
    expected = newton_schulz(grad).float().norm()
    assert newton_schulz(grad * 10.0**exponent).float().norm() == pytest.approx(expected.item(), rel=0.01)


def test_zero_gives_zero_and_neighbours_are_untouched():
    stack = gaussian(3, 16, 24)
    stack[1] = 0
    result = newton_schulz(stack, dtype=torch.float32)
    assert torch.equal(result[1], torch.zeros(16, 24))
    assert torch.equal(result[0], newton_schulz(stack[:1], dtype=torch.float32)[0])


def test_non_finite_stays_in_its_matrix():
    stack = gaussian(2, 16, 24)
    stack[0, 3, 3] = float("nan")
    result = newton_schulz(stack)
    assert result[0].isnan().any()
    assert result[1].isfinite().all()


def test_low_precision_input():
    grad = gaussian(32, 64)
    assert torch.equal(newton_schulz(grad.bfloat16()), newton_schulz(grad.bfloat16().float()))


def test_bad_arguments():
    with pytest.raises(ValueError, match="known: jordan, polar_express, quintic"):
        newton_schulz(torch.ones(2, 2), coefficients="nope")
    with pytest.raises(ValueError, match="steps is 0"):
        newton_schulz(torch.ones(2, 2), steps=0)
    with pytest.raises(ValueError, match="got shape"):
        newton_schulz(torch.ones(3))


def test_last_triple_repeats():
    assert coefficients("jordan", 3) == coefficients("jordan", 1) * 3
    assert coefficients("quintic", 7)[4:] == (coefficients("quintic", 5)[-1],) * 3
    assert coefficients("polar_express", 9)[-1] == (1.875, -1.25, 0.375)


def test_coefficients_are_the_published_ones():
    """a + b + c is what one step makes of a singular value 1: a typing error in any of the numbers shows."""
    sums = {name: [round(sum(t), 4) for t in coefficients(name, 5)] for name in COEFFICIENTS}
    assert sums["jordan"] == [0.701] * 5
    assert sums["quintic"] == [0.1172, 0.2853, 0.4542, 0.9388, 0.9853]
    # Published without the safety factor; (s, s^3, s^5) is divided out.
    s = 1.01
    raw = [sum((a * s, b * s**3, c * s**5)) for a, b, c in coefficients("polar_express", 5)]
    assert [round(value, 4) for value in raw] == [1.9917, 1.7041, 1.5916, 1.34, 1.0506]


def test_flops_formula_matches_counter():
    from torch.utils.flop_counter import FlopCounterMode

    for shape in [(32, 96), (96, 32), (64, 64)]:
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.ones(shape))
        assert counter.get_total_flops() == matmul_flops(*shape)
