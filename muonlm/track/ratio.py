"""How many tokens another run needed for the same loss: the token ratio along a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muonlm.config.errors import UserError
from muonlm.track.metrics import read_metrics


def first_crossing(tokens: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Tokens at which the running minimum of `losses` first comes down to `target`.

    Linear interpolation in log(tokens) between the two points around the crossing. Never extrapolates: None when the
    target is never reached, and when the first point is below it already, where the crossing lies somewhere before.
    `tokens` must be positive and ascending.
    """
    if len(tokens) != len(losses):
        raise ValueError(f"{len(tokens)} token counts for {len(losses)} losses")
    if any(count <= 0 for count in tokens):
        raise ValueError("token counts must be positive to be interpolated in their logarithm")
    lowest, previous = math.inf, 0.0
    for count, loss in zip(tokens, losses):
        if loss == target:
            return float(count)
        if loss < target:
            if math.isinf(lowest):
                return None
            # The running minimum stays at `lowest` until the point just before this one.
            share = (lowest - target) / (lowest - loss)
            return math.exp(math.log(previous) + share * (math.log(count) - math.log(previous)))
        lowest, previous = min(lowest, loss), float(count)
    return None


@dataclass(frozen=True)
class ReferenceCurve:
    """Validation loss over training tokens of a finished or running reference run."""

    tokens: tuple[float, ...]
    losses: tuple[float, ...]
    eval_tokens: int

    @classmethod
    def from_run(cls, run_dir: str | Path) -> ReferenceCurve:
        """The evaluations along the way of the run in `run_dir`; raises UserError when there are none.

        The evaluation at the end uses other sequences and is left out, so that all points are comparable.
        """
        if not Path(run_dir).is_dir():
            raise UserError(f"track.reference: {run_dir} is no directory; give the run directory of the reference run")
        evals = [r for r in read_metrics(run_dir) if r["kind"] == "eval"]
        if any({"final", "tokens", "loss", "eval_tokens"} - r.keys() for r in evals):
            raise UserError(f"track.reference: metrics.jsonl of {run_dir} is damaged: an evaluation lacks its numbers")
        points = [r for r in evals if not r["final"]]
        if not points:
            raise UserError(
                f"track.reference: {run_dir} holds no evaluation along the way; "
                "train it with eval.interval_steps above 0"
            )
        return cls(
            tuple(r["tokens"] for r in points),
            tuple(r["loss"] for r in points),
            int(points[-1]["eval_tokens"]),
        )

    def tokens_ratio(self, loss: float, tokens: float) -> float | None:
        """Tokens of the reference to reach `loss`, divided by `tokens`; None outside the reference's curve.

        Above 1, this run needs fewer tokens than the reference.
        """
        crossing = first_crossing(self.tokens, self.losses, loss)
        return None if crossing is None else crossing / tokens
