"""The named sets: what is in them, how many steps they make, and where they leave singular values."""

import pytest
import torch

from muonlm_kernels.bench.emulated import iterate_standard, normalize
from muonlm_kernels.coefficients import COEFFICIENTS, DEFAULT, coefficients
from muonlm_kernels.generator import CONVERGED, polar_express

# a + b + c, what one step makes of a singular value 1: a typing error in any of the numbers shows.
SUMS = {
    "jordan": [0.701] * 5,
    "quintic": [0.1172, 0.2853, 0.4542, 0.9388, 0.9853],
    "cans": [1.9915, 1.6547, 1.5708, 1.3293, 1.0452],
    "turbo": [-0.5852, 0.5065, 0.8888, 0.989],
    "turbo_snapshot": [0.6268, 0.8434, 1.0096, 0.9563],
    "deepseek_v4": [0.701] * 8 + [1.0, 1.0],
    "cubic5": [0.0236, 1.0787, 1.1056, 1.1655, 1.26],
}


def after(triples, values):
    for a, b, c in triples:
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("name", SUMS)
def test_published_numbers(name):
    assert [round(sum(triple), 4) for triple in coefficients(name)] == SUMS[name]


def test_polar_express_is_the_generated_composition():
    assert coefficients(DEFAULT) == coefficients("polar_express") == polar_express(1e-3, 5, safety=1.01)
    assert coefficients("polar_express", 7, safety=1.05) == polar_express(1e-3, 7, safety=1.05)
    assert coefficients("polar_express", 20)[7:] == (CONVERGED,) * 13


@pytest.mark.parametrize(("name", "each"), COEFFICIENTS.items())
def test_entries_are_whole(name, each):
    assert each.name == name
    assert len(coefficients(name)) == each.steps
    assert each.fewest <= each.steps
    assert all(len(triple) == 3 and triple[0] > 1 for triple in each.triples)
    assert "arXiv" in each.source or "(20" in each.source or name == "deepseek_v4"
    assert (each.preconditioner == "aol") == name.startswith("turbo")


@pytest.mark.parametrize("name", [name for name, each in COEFFICIENTS.items() if each.preconditioner == "frobenius"])
def test_own_number_of_steps_brings_singular_values_near_one(name):
    """Of a matrix whose singular values span a factor 10; the wider bands are those of jordan and cubic5."""
    result = after(coefficients(name), torch.linspace(0.1, 1, 1001, dtype=torch.float64))
    low, high = {"jordan": (0.68, 1.14), "cubic5": (0.77, 1.31)}.get(name, (0.86, 1.14))
    assert low <= result.min() <= result.max() <= high


@pytest.mark.parametrize("name", [name for name, each in COEFFICIENTS.items() if each.repeats])
def test_repeated_last_triple_stays_near_one(name):
    values = torch.linspace(0.01, 0.85 if name == "turbo" else 1, 2001, dtype=torch.float64)
    result = after(coefficients(name, COEFFICIENTS[name].steps + 30), values)
    tolerance = 0.33 if name == "jordan" else 0.02
    assert (result - 1).abs().max() < tolerance


@pytest.mark.parametrize("name", [name for name, each in COEFFICIENTS.items() if not each.repeats])
def test_last_triple_that_would_not_stay_near_one_is_not_repeated(name):
    each = COEFFICIENTS[name]
    values = torch.linspace(0.1, 0.8, 2001, dtype=torch.float64)
    assert (after(each.triples + each.triples[-1:] * 30, values) - 1).abs().max() > 0.02
    with pytest.raises(
        ValueError, match=f"{name} makes at least 1 and at most {each.steps} steps, not {each.steps + 1}"
    ):
        coefficients(name, each.steps + 1)


def test_fewer_steps_are_the_first():
    assert coefficients("quintic", 3) == coefficients("quintic")[:3]
    assert coefficients("jordan", 2) == coefficients("jordan", 1) * 2
    with pytest.raises(ValueError, match="deepseek_v4 makes at least 10 steps, not 9"):
        coefficients("deepseek_v4", 9)


@pytest.mark.parametrize("name", list(COEFFICIENTS))
def test_only_turbo_turns_the_direction_of_a_gradient_of_rank_one(name):
    generator = torch.Generator().manual_seed(0)
    grad_MN = torch.randn(24, 1, generator=generator) @ torch.randn(1, 40, generator=generator)
    x_MN = normalize(grad_MN, COEFFICIENTS[name].preconditioner)
    alignment = (iterate_standard(x_MN, coefficients(name), torch.float32) * grad_MN).sum()
    assert (alignment > 0) == (name != "turbo")


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown coefficient set 'nope'; known: jordan, polar_express, quintic"):
        coefficients("nope")
    with pytest.raises(ValueError, match="steps is 0"):
        coefficients("jordan", 0)
    with pytest.raises(ValueError, match="quintic has no safety factor"):
        coefficients("quintic", 5, safety=1.01)
    with pytest.raises(ValueError, match="safety is 2"):
        coefficients("polar_express", 5, safety=2)
