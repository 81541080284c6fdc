"""The exact polar factor and the measures of error, on matrices whose answer is known."""

import math

import pytest
import torch

from muonlm_kernels import oracle


def orthogonal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_spectrum(singular_values, rows=12, columns=20):
    """A matrix, and its polar factor."""
    s = torch.tensor(singular_values, dtype=torch.float64)
    u, v = orthogonal(rows, len(s), 0), orthogonal(columns, len(s), 1)
    return (u * s) @ v.mT, u @ v.mT


@pytest.mark.parametrize("turned", [False, True])
def test_polar_factor(turned):
    grad, exact = with_spectrum([3.0, 1.0, 1e-3, 1e-9])
    grad, exact = (grad.mT, exact.mT) if turned else (grad, exact)
    # A singular value of 1e-9 is a millionth of a rounding of float64 above it: its direction is known to 1e-6.
    assert torch.allclose(oracle.polar_factor(grad), exact, atol=1e-5)
    stack = torch.stack([grad, torch.zeros_like(grad), -2 * grad])
    assert torch.allclose(oracle.polar_factor(stack), torch.stack([exact, torch.zeros_like(exact), -exact]), atol=1e-5)


def test_polar_factor_of_given_rank_leaves_rounding_out():
    grad, exact = with_spectrum([3.0, 1.0, 0.5])
    assert oracle.relative_error(oracle.polar_factor(grad.float(), rank=3), exact) < 1e-6
    assert oracle.relative_error(oracle.polar_factor(grad.float()), exact) > 0.5


def test_relative_error():
    _, exact = with_spectrum([1.0, 1.0])
    assert oracle.relative_error(exact, exact) == 0
    assert oracle.relative_error(1.1 * exact, exact) == pytest.approx(0.1)
    assert oracle.relative_error(-exact.float(), exact) == pytest.approx(2)


def test_orthogonality_error():
    assert oracle.orthogonality_error(orthogonal(9, 5, 0)) < 1e-14
    assert oracle.orthogonality_error(orthogonal(9, 5, 0).mT) < 1e-14
    assert oracle.orthogonality_error(torch.zeros(4, 7)) == pytest.approx(1)
    assert oracle.orthogonality_error(1.1 * torch.eye(6)) == pytest.approx(0.21)
    # One of four directions missing.
    assert oracle.orthogonality_error(torch.eye(4)[:, :3] @ torch.eye(3, 8)) == pytest.approx(math.sqrt(1 / 4))


def test_singular_values_are_those_in_the_directions_of_the_input():
    grad, exact = with_spectrum([4.0, 2.0, 1.0])
    estimate, _ = with_spectrum([0.7, 0.9, 1.2])
    outside = torch.linalg.svd(grad)[0][:, 3:4]
    noisy = estimate + 5 * (outside @ torch.ones(1, 20, dtype=torch.float64))
    assert oracle.singular_value_range(estimate, grad) == pytest.approx((0.7, 0.9, 1.2))
    assert oracle.singular_value_range(noisy, grad) == pytest.approx((0.7, 0.9, 1.2))
    assert oracle.singular_value_range(exact, grad.float(), rank=3) == pytest.approx((1, 1, 1), abs=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_noise_leak(turned):
    grad, exact = with_spectrum([4.0, 2.0, 1.0])
    u, v = torch.linalg.svd(grad)[0], torch.linalg.svd(grad)[2].mT
    # Energy 3 inside; 1 in a new column direction, 2 in a new row direction.
    noisy = exact + torch.outer(u[:, 5], v[:, 0]) + 2**0.5 * torch.outer(u[:, 1], v[:, 7])
    grad, noisy = (grad.mT, noisy.mT) if turned else (grad, noisy)
    assert oracle.noise_leak(noisy, grad) == pytest.approx(0.5)
    assert oracle.noise_leak(oracle.polar_factor(grad), grad) == pytest.approx(0, abs=1e-12)


def test_numerical_rank_follows_the_dtype_of_the_input():
    grad, exact = with_spectrum([1.0, 0.5, 1e-8])
    assert oracle.singular_value_range(exact, grad)[0] == pytest.approx(1)
    assert oracle.noise_leak(exact, grad) == pytest.approx(0, abs=1e-12)
    assert oracle.noise_leak(exact, grad.float()) == pytest.approx(1 / 3, abs=1e-6)
