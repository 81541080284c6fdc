"""Whole iterations and the momentum, as callers use them, with every memory access of every launch checked."""

from __future__ import annotations

import pytest
import torch

from muonlm_kernels.gpu import backend, configs, symmetric, tma, update

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (
    (8.205, -22.90, 16.460),
    (4.066, -2.861, 0.5184),
    (3.909, -2.823, 0.525),
    (3.286, -2.416, 0.4853),
    (2.278, -1.620, 0.3980),
)
# Distance from the same recurrence in float64, relative to its norm.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _recurrence(grad_KMN: torch.Tensor, triples) -> torch.Tensor:
    x = grad_KMN.double()
    x = x / x.norm(dim=(1, 2), keepdim=True)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 48, 80), (1, 80, 48), (2, 40, 72), (1, 65, 33), (2, 1, 9), (2, 9, 1)])
def test_standard_follows_the_recurrence(clean, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad = _random(*shape)
    out, finite = backend.orthogonalize(grad, JORDAN, dtype=dtype)
    assert out.shape == grad.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert finite.all()
    assert _error(out, _recurrence(grad, JORDAN)) < TOLERANCE[dtype]
    assert len(clean) == 2 + 3 * len(JORDAN)


@pytest.mark.parametrize(
    ("shape", "restarts"), [((2, 40, 72), (2,)), ((1, 80, 48), (2,)), ((1, 130, 34), ()), ((1, 20, 33), (1, 3, 9))]
)
def test_gram_follows_the_recurrence(clean, shape: tuple[int, ...], restarts: tuple[int, ...]) -> None:
    grad = _random(*shape)
    out, _ = backend.orthogonalize(grad, JORDAN, dtype=torch.float16, method="gram", restarts=restarts)
    assert _error(out, _recurrence(grad, JORDAN)) < 5e-3
    assert len(clean) == backend.launches(backend.segments_of("gram", 5, restarts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exponent", [0, -6])
def test_pairs_orthogonalize_as_well_as_single_steps(clean, dtype: torch.dtype, exponent: int) -> None:
    """Singular values of one size and over six decades, on which R drifts most; none overshoots."""
    u, _, vh = torch.linalg.svd(_random(1, 40, 72).double(), full_matrices=False)
    grad = (u * torch.logspace(0, exponent, 40)) @ vh
    paired, _ = backend.orthogonalize(grad, POLAR_EXPRESS, dtype=dtype, method="paired")
    standard, _ = backend.orthogonalize(grad, POLAR_EXPRESS, dtype=dtype)
    assert _error(paired, u @ vh) < _error(standard, u @ vh) + 0.01
    assert torch.linalg.matrix_norm(paired.double(), 2) < torch.linalg.matrix_norm(standard.double(), 2) + 0.03
    assert len(clean) == (2 + 4 * 5 - 3) + (2 + 3 * 5)


def test_segments_and_launches_are_as_documented() -> None:
    assert backend.segments_of("standard", 3) == [(0, 1), (1, 2), (2, 3)]
    assert backend.segments_of("paired", 5) == [(0, 2), (2, 4), (4, 5)]
    assert backend.segments_of("gram", 5) == [(0, 2), (2, 5)]
    assert backend.segments_of("gram", 2, (2, 7)) == [(0, 2)]
    assert backend.launches(backend.segments_of("standard", 5)) == 2 + 3 * 5
    assert backend.launches(backend.segments_of("gram", 5)) == 2 + 4 * 5 - 2


def _leak(compensated: bool, method: str) -> float:
    """Energy of the result outside the column and row spaces of a matrix of rank 8, as a part of the whole."""
    u, v = torch.linalg.qr(_random(64, 8))[0], torch.linalg.qr(_random(256, 8, seed=1))[0]
    out, _ = backend.orthogonalize(
        (u @ v.mT)[None], POLAR_EXPRESS, dtype=torch.bfloat16, compensated=compensated, method=method
    )
    x = out[0].double()
    inside = u.double() @ (u.double().mT @ x @ v.double()) @ v.double().mT
    return float(((x - inside).norm() / x.norm()).square())


@pytest.mark.parametrize("method", ["standard", "paired"])
def test_compensation_keeps_noise_out_of_the_null_space(clean, method: str) -> None:
    assert _leak(False, method) > 0.1
    assert _leak(True, method) < 0.05


@pytest.mark.parametrize("shape", [(1, 48, 80), (1, 80, 48), (1, 40, 72), (1, 72, 40)])
def test_compensation_reaches_every_form_of_the_result(clean, shape: tuple[int, ...]) -> None:
    """A single step with so large a coefficient that it is carried: it reads lo, and its result is the last."""
    grad, triples = _random(*shape), ((100.0, -1.0, 0.0),)
    compensated, _ = backend.orthogonalize(grad, triples, dtype=torch.bfloat16, compensated=True)
    plain, _ = backend.orthogonalize(grad, triples, dtype=torch.bfloat16)
    exact = _recurrence(grad, triples)
    assert _error(compensated, exact) < 2.0**-9
    assert _error(compensated, exact) < 0.8 * _error(plain, exact)


def test_gram_takes_the_standard_method_for_nearly_square_stacks(clean) -> None:
    backend.orthogonalize(_random(1, 40, 48), JORDAN, dtype=torch.float16, method="gram")
    assert len(clean) == 2 + 3 * len(JORDAN)


def test_gram_refuses_bfloat16_and_says_why() -> None:
    with pytest.raises(ValueError, match=r"needs torch.float16.*use method='paired'"):
        backend.orthogonalize(_random(1, 8, 16), JORDAN, dtype=torch.bfloat16, method="gram")


def test_a_changing_triple_and_a_cubic_step(clean) -> None:
    grad, triples = _random(1, 40, 72), (*POLAR_EXPRESS[:2], (1.5, -0.5, 0.0), (1.5, -0.5, 0.0))
    out, _ = backend.orthogonalize(grad, triples, dtype=torch.float16)
    assert _error(out, _recurrence(grad, triples)) < 2 * TOLERANCE[torch.float16]
    assert len(clean) == 2 + 3 * 2 + 2 * 2


@pytest.mark.parametrize("exponent", [-116, 116])
def test_the_result_does_not_depend_on_the_scale(clean, exponent: int) -> None:
    """2^116 is 8e34: squares of such entries overflow fp32, and those of 2^-116 vanish."""
    grad = _random(1, 33, 40)
    plain, _ = backend.orthogonalize(grad, JORDAN[:2], dtype=torch.bfloat16)
    scaled, finite = backend.orthogonalize(grad * 2.0**exponent, JORDAN[:2], dtype=torch.bfloat16)
    assert torch.equal(plain, scaled)
    assert finite.all()


def test_a_bad_matrix_leaves_its_neighbours_alone(clean) -> None:
    grad = _random(4, 33, 40)
    alone, _ = backend.orthogonalize(grad, JORDAN[:2], dtype=torch.bfloat16)
    grad[1] = 0
    grad[2, 5, 6] = float("inf")
    out, finite = backend.orthogonalize(grad, JORDAN[:2], dtype=torch.bfloat16)
    assert finite.tolist() == [True, True, False, True]
    assert torch.equal(out[[0, 3]], alone[[0, 3]])
    assert torch.equal(out[1:3], torch.zeros_like(out[1:3]))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("shape", [(1, 33, 40), (1, 40, 33)])
def test_few_steps_end_in_the_result(clean, shape: tuple[int, ...], steps: int) -> None:
    grad = _random(*shape)
    out, _ = backend.orthogonalize(grad, JORDAN[:steps], dtype=torch.float16)
    assert _error(out, _recurrence(grad, JORDAN[:steps])) < TOLERANCE[torch.float16]


def test_a_strided_gradient_of_another_type_is_read_and_kept(clean) -> None:
    storage = _random(2, 50, 90).double()
    kept = storage.clone()
    grad = storage[:, 1:41, ::2]
    out, _ = backend.orthogonalize(grad, JORDAN[:2], dtype=torch.float16)
    assert _error(out, _recurrence(grad, JORDAN[:2])) < TOLERANCE[torch.float16]
    assert torch.equal(storage, kept)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (2, 4, 0)])
def test_empty_stacks_launch_nothing(clean, shape: tuple[int, ...]) -> None:
    out, finite = backend.orthogonalize(torch.zeros(shape), JORDAN, dtype=torch.bfloat16)
    new, partials = backend.momentum_update(
        torch.zeros(shape), torch.zeros(shape), beta=0.9, nesterov=True, ema=True, out_dtype=torch.bfloat16
    )
    assert out.shape == new.shape == shape
    assert finite.tolist() == [True] * shape[0]
    assert backend.frobenius_norms(partials).tolist() == [0.0] * shape[0]
    assert clean == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grad_KMN": torch.zeros(3, 4)}, "unsqueeze"),
        ({"grad_KMN": torch.zeros(1, 3, 4, dtype=torch.int64)}, "floating point"),
        ({"dtype": torch.float32}, "float16"),
        ({"method": "cubic"}, "known: standard, paired, gram"),
        ({"triples": ()}, "at least one"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    given = {"grad_KMN": torch.ones(1, 3, 4), "triples": JORDAN, "dtype": torch.bfloat16, **arguments}
    with pytest.raises(ValueError, match=message):
        backend.orthogonalize(**given)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_momentum_is_muons(clean, ema: bool, nesterov: bool) -> None:
    grad, start, beta = _random(2, 33, 40), _random(2, 33, 40, seed=1), 0.95
    momentum = start.clone()
    out, _ = backend.momentum_update(grad, momentum, beta=beta, nesterov=nesterov, ema=ema, out_dtype=torch.float32)
    if ema:
        expected = start.lerp(grad, 1 - beta)
        expected_out = grad.lerp(expected, beta) if nesterov else expected
    else:
        expected = beta * start + grad
        expected_out = grad + beta * expected if nesterov else expected
    torch.testing.assert_close(momentum, expected)
    torch.testing.assert_close(out, expected_out)


def test_norms_of_the_momentum_save_the_iteration_a_launch(clean) -> None:
    grad, momentum = _random(2, 33, 40), torch.zeros(2, 33, 40)
    new, partials = backend.momentum_update(
        grad, momentum, beta=0.95, nesterov=True, ema=True, out_dtype=torch.bfloat16
    )
    torch.testing.assert_close(backend.frobenius_norms(partials), new.float().norm(dim=(1, 2)))
    before = len(clean)
    with_norms, _ = backend.orthogonalize(new, JORDAN[:2], dtype=torch.bfloat16, partials_K2P=partials)
    assert len(clean) - before == 1 + 3 * 2
    without, _ = backend.orthogonalize(new, JORDAN[:2], dtype=torch.bfloat16)
    assert torch.equal(with_norms, without)


def test_norms_of_matrices_that_are_not_finite_are_not_either() -> None:
    grad = _random(3, 9, 9)
    grad[1, 2, 3] = float("nan")
    grad[2, 0, 0] = float("inf")
    _, partials = backend.momentum_update(
        grad, torch.zeros(3, 9, 9), beta=0.9, nesterov=False, ema=True, out_dtype=torch.bfloat16
    )
    assert backend.frobenius_norms(partials).isfinite().tolist() == [True, False, False]


def test_momentum_needs_two_stacks_of_one_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        backend.momentum_update(
            torch.zeros(1, 3, 4), torch.zeros(1, 4, 3), beta=0.9, nesterov=True, ema=True, out_dtype=torch.bfloat16
        )


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_shipped_tiles_are_right_at_their_own_size(clean, kernel_checks, target: str) -> None:
    """The other tests use small tiles, which cost the interpreter less."""
    x = _random(1, 304, 144).bfloat16()
    b = x @ x.mT
    product, times = (tma.symmetric_tma, tma.update_tma) if target == "sm_90" else (symmetric.symmetric, update.update)
    out = kernel_checks.poisoned((1, 304, 304), x.dtype, "contiguous")
    product(x, x, out, configs.pick(target, "symmetric", batch=1, rows=8192, cols=8192))
    kernel_checks.assert_rounded(out, x.double() @ x.double().mT, 144)
    out = kernel_checks.poisoned((1, 304, 144), x.dtype, "contiguous")
    times(b, x, out, configs.pick(target, "update", batch=1, rows=8192, cols=8192), beta=2.0)
    kernel_checks.assert_rounded(out, b.double() @ x.double() + 2 * x.double(), 304)


def test_a_stack_gets_larger_tiles_than_one_matrix() -> None:
    def tile(batch: int, rows: int) -> int:
        return configs.pick("sm_90", "update", batch=batch, rows=rows, cols=4 * rows).block_n

    assert [tile(1, 512), tile(3, 512), tile(16, 512)] == [64, 128, 256]
    assert tile(1, 8192) == 256


@pytest.mark.parametrize("target", configs.TARGETS)
def test_shipped_kernels_are_described_completely(target: str) -> None:
    shipped = configs.shipped(target)
    assert len({kernel.label for kernel in shipped}) == len(shipped)
    for kernel in shipped:
        assert list(kernel.signature) == list(kernel.fn.arg_names)
        assert {name for name, kind in kernel.signature.items() if kind == "constexpr"} == set(kernel.constexprs)
        assert set(kernel.divisible) < set(kernel.signature)
