"""Ratio maths on curves with known answers."""

from __future__ import annotations

import math

import pytest

from muonlm.compare.ratio import SeedRatio, log_interval, paired_ratio, summarise, t_quantile


def log_linear(efficiency: float, budgets: list[float], offset: float = 0.0) -> dict[float, float]:
    return {t: 10 - 0.5 * math.log(efficiency * t) + offset for t in budgets}


@pytest.mark.parametrize("efficiency", [1.07, 1.2, 1.3])
def test_log_linear_curves_give_the_exact_ratio(efficiency: float) -> None:
    result = paired_ratio(log_linear(1, [1e6]), log_linear(efficiency, [7.5e5, 8.75e5, 1e6]), 0)
    assert result.ratio == pytest.approx(efficiency, rel=1e-12)
    assert result.censored is None
    assert result.interpolated == "arm"
    assert result.target_loss == pytest.approx(10 - 0.5 * math.log(1e6))


def test_a_worse_arm_is_measured_along_the_reference() -> None:
    result = paired_ratio(log_linear(1, [6e5, 8e5, 1e6]), log_linear(0.7, [9e5, 1e6]), 0)
    assert result.ratio == pytest.approx(0.7)
    assert result.interpolated == "reference"
    assert result.gap == pytest.approx(8 / 6)


def test_an_arm_better_already_at_its_smallest_budget_is_censored_above() -> None:
    result = paired_ratio(log_linear(1, [1e6]), log_linear(1.5, [7.5e5, 1e6]), 0)
    assert (result.ratio, result.censored) == (None, ">")
    assert result.bound == pytest.approx(4 / 3)


def test_an_arm_worse_than_all_of_the_reference_is_censored_below() -> None:
    result = paired_ratio(log_linear(1, [8e5, 1e6]), log_linear(0.5, [8e5, 1e6]), 0)
    assert (result.ratio, result.censored) == (None, "<")
    assert result.bound == pytest.approx(0.8)


def test_equal_runs_have_ratio_one_and_are_not_censored() -> None:
    result = paired_ratio(log_linear(1, [1e6]), log_linear(1, [7.5e5, 1e6]), 0)
    assert result.ratio == pytest.approx(1)


def test_interpolation_is_in_log_tokens_between_neighbours() -> None:
    """Half way in loss between 1M and 4M tokens is 2M; a point far away has no influence."""
    result = paired_ratio({4e6: 2.5}, {1e5: 9.0, 1e6: 3.0, 4e6: 2.0}, 0)
    assert result.arm_tokens == pytest.approx(2e6)
    assert result.ratio == pytest.approx(2)
    assert result.gap == pytest.approx(4)


def test_failed_runs_leave_the_ratio_unknown_and_say_so() -> None:
    curve = log_linear(1, [8e5, 1e6])
    failed_reference = paired_ratio(curve | {1e6: math.inf}, curve, 0)
    failed_arm = paired_ratio(curve, curve | {1e6: math.inf}, 0)
    assert (failed_reference.ratio, failed_reference.bound) == (None, None)
    assert "reference" in (failed_reference.note or "")
    assert "arm" in (failed_arm.note or "")


# Two-sided 95% quantiles as printed in tables of Student's t.
@pytest.mark.parametrize(("n", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_t_quantiles(n: int, t: float) -> None:
    assert t_quantile(n) == pytest.approx(t, abs=5e-4)


def test_interval_of_three_ratios() -> None:
    """ln: 0.1, 0.2, 0.3: mean 0.2, sd 0.1, half width 4.30265 * 0.1 / sqrt 3 = 0.248414."""
    interval = log_interval([math.exp(x) for x in (0.1, 0.2, 0.3)])
    assert interval.mean == pytest.approx(math.exp(0.2))
    assert interval.low == pytest.approx(math.exp(0.2 - 0.248414), rel=1e-5)
    assert interval.high == pytest.approx(math.exp(0.2 + 0.248414), rel=1e-5)


def test_one_seed_has_no_interval() -> None:
    assert log_interval([1.2]).mean == pytest.approx(1.2)
    assert log_interval([1.2]).low is None


def test_one_censored_seed_makes_the_mean_unknown_but_leaves_a_bound() -> None:
    seeds = [SeedRatio(0, 1.2), SeedRatio(1, None, ">", 1.3)]
    entry = summarise("muon", "budget", seeds, [1.0, 1.0])
    assert (entry["mean"], entry["low"]) == (None, None)
    assert entry["bound"] == {"sign": ">", "value": pytest.approx(math.sqrt(1.2 * 1.3))}


def test_wall_clock_ratio_is_the_token_ratio_times_the_paired_speed_factor() -> None:
    seeds = [SeedRatio(0, 1.2), SeedRatio(1, 1.3)]
    entry = summarise("muon", "budget", seeds, [0.8, 0.9])
    assert entry["wall_clock"]["mean"] == pytest.approx(math.sqrt(1.2 * 0.8 * 1.3 * 0.9))
    assert entry["mean"] == pytest.approx(math.sqrt(1.2 * 1.3))
