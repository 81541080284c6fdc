"""The token ratio against closed forms."""

from __future__ import annotations

import math

import pytest

from muonlm.config.errors import UserError
from muonlm.track.metrics import MetricsWriter
from muonlm.track.ratio import ReferenceCurve, first_crossing


def test_linear_in_log_tokens() -> None:
    """loss = 10 - ln(tokens) is a line in log tokens, so that interpolation is exact anywhere."""
    tokens = [math.exp(x) for x in (1, 2.5, 4, 7)]
    losses = [9, 7.5, 6, 3]
    for target in (8.9, 7.5, 5.1, 3.0):
        assert first_crossing(tokens, losses, target) == pytest.approx(math.exp(10 - target))


def test_never_extrapolates() -> None:
    assert first_crossing([1, 2, 3], [5, 4, 3], 2.9) is None
    assert first_crossing([1, 2, 3], [5, 4, 3], 5.1) is None
    assert first_crossing([1, 2, 3], [5, 4, 3], 5) == 1
    assert first_crossing([], [], 1) is None


def test_first_crossing_of_the_running_minimum() -> None:
    """A bump between points does not move the crossing: the minimum holds until the point before it."""
    assert first_crossing([1, 10, 100, 1000], [5, 4, 6, 2], 3) == pytest.approx(math.sqrt(100 * 1000))
    assert first_crossing([1, 10, 100, 1000], [5, 3, 9, 2], 4) == pytest.approx(math.sqrt(10))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        first_crossing([0, 1], [2, 1], 1.5)
    with pytest.raises(ValueError, match="3 token counts for 2 losses"):
        first_crossing([1, 2, 3], [2, 1], 1.5)


def test_reference_curve_leaves_the_final_evaluation_out(tmp_path) -> None:
    writer = MetricsWriter(tmp_path)
    for step, loss in ((1, 4.0), (2, 3.0)):
        record = {"step": step, "tokens": step * 1000, "loss": loss, "final": False, "eval_tokens": 64}
        writer.write("eval", record)
        writer.write("train", {"step": step, "tokens": step * 1000, "loss": 0.0})
    writer.write("eval", {"step": 2, "tokens": 2000, "loss": 1.0, "final": True, "eval_tokens": 640})
    writer.close()
    curve = ReferenceCurve.from_run(tmp_path)
    assert curve == ReferenceCurve((1000, 2000), (4.0, 3.0), 64)
    assert curve.tokens_ratio(3.5, 500) == pytest.approx(1000 * math.sqrt(2) / 500)
    assert curve.tokens_ratio(2.0, 500) is None


def test_a_reference_without_evaluations_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no evaluation along the way"):
        ReferenceCurve.from_run(tmp_path)
    with pytest.raises(UserError, match="no directory"):
        ReferenceCurve.from_run(tmp_path / "absent")
