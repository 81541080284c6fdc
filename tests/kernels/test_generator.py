"""Minimax compositions: the published tables come out, and they are minimax."""

from itertools import pairwise

import pytest

from muonlm_kernels.generator import CONVERGED, PUBLISHED_CUSHION, evaluate, guarded, polar_express

# arXiv 2505.16932, for singular values in [1e-3, 1], before the safety factor.
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
# The five-step table of modded-nanogpt and nanochat: cushion 0.02, safety 1.02 followed from step to step.
PUBLISHED_WITHIN = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def made_of(triples, values):
    for triple in triples:
        values = [evaluate(triple, x) for x in values]
    return values


def grid(lower, points=4001):
    return [lower ** (1 - index / (points - 1)) for index in range(points)]


def test_reproduces_the_published_table():
    made = polar_express(1e-3, 8, safety=1.0)
    for triple, published in zip(made[:6], PUBLISHED, strict=False):
        assert triple == pytest.approx(published, rel=1e-13)
    # The published seventh was solved in a basis that cancels near convergence: 9e-12 off.
    assert made[6] == pytest.approx(PUBLISHED[6], abs=1e-10)
    assert made[7] == CONVERGED


def test_reproduces_the_table_that_is_guarded_from_step_to_step():
    made = polar_express(1e-3, 5, safety=1.02, cushion=0.02, guard="within")
    for triple, published in zip(made, PUBLISHED_WITHIN, strict=True):
        assert triple == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("cushion", [0.0, PUBLISHED_CUSHION])
@pytest.mark.parametrize("lower", [1e-7, 1e-5, 1e-3, 0.03, 0.3, 0.9])
@pytest.mark.parametrize("steps", range(1, 13))
def test_error_is_the_same_on_both_sides_of_one(lower, steps, cushion):
    """Equal ripple: as far below 1 at the worst as above it, for every length."""
    values = made_of(polar_express(lower, steps, safety=1.0, cushion=cushion), grid(lower))
    below, above = 1 - min(values), max(values) - 1
    assert 0 <= below <= 1
    assert below == pytest.approx(above, rel=2e-3, abs=2e-15)


def test_no_neighbour_is_better():
    """Without a cushion a single quintic is the best there is: any small change of any coefficient makes it worse."""
    xs = grid(0.05)
    (best,) = polar_express(0.05, 1, safety=1.0, cushion=0.0)

    def worst(triple):
        return max(abs(1 - evaluate(triple, x)) for x in xs)

    for index in range(3):
        for change in (-1e-3, 1e-3):
            neighbour = list(best)
            neighbour[index] *= 1 + change
            assert worst(tuple(neighbour)) > worst(best) + 1e-5
    # Moving all three together along the equioscillation does not help either.
    assert worst(tuple(value * 1.001 for value in best)) > worst(best)


@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.1])
def test_more_steps_and_larger_bounds_are_nearer(lower):
    def worst(bound, steps):
        return max(abs(1 - x) for x in made_of(polar_express(bound, steps, safety=1.0), grid(bound)))

    errors = [worst(lower, steps) for steps in range(1, 9)]
    assert all(later <= earlier + 1e-14 for earlier, later in pairwise(errors))
    assert worst(lower * 3, 4) < worst(lower, 4)


def test_a_longer_composition_begins_with_the_shorter():
    assert polar_express(1e-3, 5) == polar_express(1e-3, 8)[:5]


def test_cushion_bounds_the_slopes_and_zero_turns_it_off():
    slopes = [polar_express(1e-5, 1, safety=1.0, cushion=cushion)[0][0] for cushion in (0.1, PUBLISHED_CUSHION, 0.0)]
    assert slopes[0] < slopes[1] < slopes[2]
    values = made_of(polar_express(1e-5, 1, safety=1.0, cushion=0.1), grid(1e-5))
    assert values == sorted(values[:2000]) + values[2000:]  # keeps the order of small singular values


def test_safety_is_the_polynomial_of_a_smaller_argument():
    plain, safe = polar_express(1e-3, 3, safety=1.0), polar_express(1e-3, 3, safety=1.05)
    for raw, divided in zip(plain, safe, strict=True):
        assert divided == guarded(raw, 1.05)
        assert evaluate(divided, 0.7) == pytest.approx(evaluate(raw, 0.7 / 1.05), rel=1e-13)
    assert polar_express(1e-3, 12, safety=1.05)[-1] == CONVERGED


@pytest.mark.parametrize(
    ("lower", "steps", "options", "message"),
    [
        (0.0, 5, {}, "lower is 0.0"),
        (9e-8, 5, {}, "lower is 9e-08"),
        (0.95, 5, {}, "lower is 0.95"),
        (float("nan"), 5, {}, "lower is nan"),
        (1e-3, 0, {}, "steps is 0"),
        (1e-3, 13, {}, "steps is 13"),
        (1e-3, 5, {"safety": 0.99}, "safety is 0.99"),
        (1e-3, 5, {"cushion": -0.1}, "cushion is -0.1"),
        (1e-3, 5, {"cushion": 0.6}, "cushion is 0.6"),
        (1e-3, 5, {"guard": "before"}, "guard is 'before'"),
    ],
)
def test_bad_arguments(lower, steps, options, message):
    with pytest.raises(ValueError, match=message):
        polar_express(lower, steps, **options)
