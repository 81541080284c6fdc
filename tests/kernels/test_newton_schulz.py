"""The iteration against the exact polar factor, and against input that breaks the usual code."""

import pytest
import torch

from muonlm_kernels import COEFFICIENTS, matmul_flops, newton_schulz, polar_factor
from muonlm_kernels.oracle import noise_leak, relative_error

# Largest relative distance to the polar factor on a Gaussian matrix of aspect 4, in fp32 and, where it is made without
# a margin for rounding, in bfloat16.
GAUSSIAN_ERROR = {
    "jordan": 0.16,
    "quintic": 0.02,
    "polar_express": 0.095,
    "cans": 0.085,
    "turbo": 0.012,
    "turbo_snapshot": 0.04,
    "deepseek_v4": 0.01,
    "cubic5": 0.2,
}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)])
def test_error_against_polar_factor(name, shape):
    grad = gaussian(*shape)
    exact = polar_factor(grad)
    assert relative_error(newton_schulz(grad, coefficients=name, dtype=torch.float32), exact) < GAUSSIAN_ERROR[name]
    allowed = 0.2 if name == "cans" else GAUSSIAN_ERROR[name] + 0.02
    assert relative_error(newton_schulz(grad, coefficients=name, dtype=torch.bfloat16), exact) < allowed


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
    assert torch.allclose(newton_schulz(strided, dtype=torch.float32), plain, atol=1e-5)
    assert torch.allclose(newton_schulz(grad.mT, dtype=torch.float32), plain.mT, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 4), (2, 0, 3)])
@pytest.mark.parametrize("name", ["polar_express", "turbo"])
def test_empty(shape, name):
    finite = torch.zeros(shape[:-2], dtype=torch.bool)
    assert newton_schulz(torch.empty(shape), coefficients=name, finite=finite).shape == shape
    assert finite.all()
    assert newton_schulz([], coefficients=name) == []


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


@pytest.mark.parametrize("exponent", [-40, -35, -20, -7, 0, 7, 12, 20, 35])
@pytest.mark.parametrize("shape", [(64, 128), (160, 200), (3, 40, 30)])
def test_scale_invariant(shape, exponent):
    grad = gaussian(*shape)
    expected = newton_schulz(grad).float().norm()
    assert newton_schulz(grad * 10.0**exponent).float().norm() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_largest_and_smallest_numbers_of_a_dtype(dtype):
    limits = torch.finfo(dtype)
    sign = gaussian(160, 192).sign().to(dtype)
    expected = newton_schulz(sign).float()
    for number in (limits.max, limits.tiny):
        assert relative_error(newton_schulz(sign * number), expected) < 0.02


def test_zero_gives_zero_and_neighbours_are_untouched():
    stack = gaussian(3, 16, 24)
    stack[1] = 0
    result = newton_schulz(stack, dtype=torch.float32)
    assert torch.equal(result[1], torch.zeros(16, 24))
    assert torch.equal(result[0], newton_schulz(stack[:1], dtype=torch.float32)[0])


@pytest.mark.parametrize("shape", [(2, 16, 24), (2, 200, 150), (2, 150, 300)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_reported_and_gives_zeros(shape, value):
    stack = gaussian(*shape)
    stack[0, 3, 3] = value
    finite = torch.tensor([True, False])
    result = newton_schulz(stack, finite=finite)
    assert finite.tolist() == [False, True]
    assert torch.equal(result[0], torch.zeros_like(result[0]))
    assert torch.equal(result[1], newton_schulz(stack[1:])[0])
    with pytest.raises(FloatingPointError, match="number 0, counted from 0, of 2"):
        newton_schulz(stack)
    flag = torch.tensor(True)
    newton_schulz(stack[0], finite=flag)
    assert not flag


def test_low_precision_input():
    grad = gaussian(32, 64)
    assert torch.equal(newton_schulz(grad.bfloat16()), newton_schulz(grad.bfloat16().float()))


def test_bad_arguments():
    with pytest.raises(ValueError, match="known: jordan, polar_express, quintic"):
        newton_schulz(torch.ones(2, 2), coefficients="nope")
    with pytest.raises(ValueError, match="at least one triple"):
        newton_schulz(torch.ones(2, 2), coefficients=[])
    for coefficients in (5, (1.5, -0.5, 0.0), [("a", "b", "c")], [(1.5, float("nan"), 0.0)]):
        with pytest.raises(ValueError, match="at least one triple"):
            newton_schulz(torch.ones(2, 2), coefficients=coefficients)
    with pytest.raises(ValueError, match="steps is for a named set"):
        newton_schulz(torch.ones(2, 2), coefficients=[(1.5, -0.5, 0.0)], steps=3)
    with pytest.raises(ValueError, match=r"floating point matrices, got torch\.int64"):
        newton_schulz(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="float16 iterates are for GPUs"):
        newton_schulz(torch.ones(2, 2), dtype=torch.float16)
    for flag in (torch.zeros(3, dtype=torch.bool), torch.tensor(0.0), True):
        for grad in (torch.ones(2, 2), torch.ones(2, 2, 2)):
            with pytest.raises(ValueError, match="finite is a bool tensor of shape"):
                newton_schulz(grad, finite=flag)
    with pytest.raises(ValueError, match="a tensor or a list of tensors, got int"):
        newton_schulz(5)
    with pytest.raises(ValueError, match="a tensor or a list of tensors, got NoneType at index 1"):
        newton_schulz([torch.ones(2, 2), None])
    with pytest.raises(ValueError, match=r"dense matrices, got a Tensor of layout torch\.sparse_coo"):
        newton_schulz(torch.ones(2, 2).to_sparse())
    with pytest.raises(ValueError, match="of one shape, dtype and device"):
        newton_schulz([torch.ones(2, 2), torch.ones(2, 3)])
    for steps in (0, 2.5, "5"):
        with pytest.raises(ValueError, match=f"steps is {steps!r}; a whole number"):
            newton_schulz(torch.ones(2, 2), steps=steps)
    with pytest.raises(ValueError, match="got shape"):
        newton_schulz(torch.ones(3))


def test_flops_formula_matches_counter():
    from torch.utils.flop_counter import FlopCounterMode

    for shape in [(32, 96), (96, 32), (64, 64)]:
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.ones(shape))
        assert counter.get_total_flops() == matmul_flops(*shape)


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (3, 96, 200)])
def test_low_rank_noise_and_its_remedy(shape):
    """A gradient of rank 8: at most 5 % of the result's energy is outside its row and column space."""
    grad = gaussian(*shape[:-1], 8) @ gaussian(*shape[:-2], 8, shape[-1], seed=1)
    with_remedy = newton_schulz(grad, dtype=torch.bfloat16, compensated=True)
    plain = newton_schulz(grad, dtype=torch.bfloat16)
    for one, better, noisy in zip(*(x.view(-1, *shape[-2:]) for x in (grad, with_remedy, plain)), strict=True):
        assert noise_leak(better, one, rank=8) < 0.05
        assert noise_leak(noisy, one, rank=8) > 0.15


def test_grad_that_records_a_graph():
    grad = gaussian(16, 24).requires_grad_()
    assert torch.equal(newton_schulz(grad), newton_schulz(grad.detach()))
    assert not newton_schulz(grad).requires_grad


@pytest.mark.parametrize("shape", [(16, 24), (200, 40)])
def test_triples_may_be_lists(shape):
    grad, triple = gaussian(*shape), (1.5, -0.5, 0.0)
    assert torch.equal(newton_schulz(grad, coefficients=[list(triple)]), newton_schulz(grad, coefficients=[triple]))


@pytest.mark.parametrize("name", ["polar_express", "turbo"])
@pytest.mark.parametrize("shape", [(16, 24), (2, 16, 24), (150, 160)])
def test_autocast_does_not_change_the_precision(shape, name):
    grad = gaussian(*shape)
    expected = newton_schulz(grad, coefficients=name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = newton_schulz(grad, coefficients=name, dtype=torch.float32)
    assert torch.equal(result, expected)


def test_a_sharded_matrix_is_refused():
    class Sharded(torch.Tensor):
        """Has, as a DTensor, parts elsewhere."""

        def full_tensor(self) -> torch.Tensor:
            return self

    for shape in [(16, 24), (150, 160), (2, 16, 24)]:
        with pytest.raises(ValueError, match="whole, dense matrices, got a Sharded"):
            newton_schulz(gaussian(*shape).as_subclass(Sharded))
