"""Token ratios between two arms: how many times the tokens of the arm the reference needs for the same loss.

Above 1 the arm is the more token-efficient one. Interpolation is linear in (log tokens, loss) and only between measured
points; what lies outside is censored, with the bound that the measurements do support. Seeds are paired: a seed is one
initialisation and one data order, which both arms share. The interval is Student's t on the logarithms of the per-seed
ratios, because a bootstrap over so few seeds covers too little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from muonlm.track.ratio import first_crossing

Method = Literal["budget", "in_run"]

MAX_BUDGET_STEP = 4 / 3
"""Adjacent budgets further apart than this factor make linear interpolation of the convex loss curve visibly wrong."""


@dataclass(frozen=True)
class SeedRatio:
    """The ratio of one seed, or why there is none.

    `ratio` is None when censored (then the true ratio is `censored` `bound`, e.g. "> 1.33") or when a run failed
    (`note`). `interpolated` names whose curve was interpolated ("arm" or "reference"), `gap` the factor between the two
    budgets around the crossing, `arm_tokens` and `reference_tokens` the tokens both need for `target_loss`.
    """

    seed: int
    ratio: float | None = None
    censored: Literal["<", ">"] | None = None
    bound: float | None = None
    target_loss: float | None = None
    interpolated: Literal["arm", "reference"] | None = None
    gap: float | None = None
    arm_tokens: float | None = None
    reference_tokens: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Interval:
    """Geometric mean over seeds and the 95% t-interval of the mean of the logarithms; None where it is unknown."""

    mean: float | None
    low: float | None
    high: float | None


def t_quantile(num_degrees: int, coverage: float = 0.95) -> float:
    """The t with P(|T| <= t) = `coverage` for Student's T with `num_degrees` degrees of freedom.

    For whole degrees of freedom the distribution has a closed form in theta = atan(t / sqrt(n)) (Abramowitz and Stegun,
    26.7.3 and 26.7.4), which is solved by bisection: exact, and no dependency on a statistics library.
    """
    if num_degrees < 1:
        raise ValueError(f"an interval needs at least 1 degree of freedom, not {num_degrees}")

    def coverage_at(theta: float) -> float:
        term, total = (math.cos(theta), 0.0) if num_degrees % 2 else (1.0, 0.0)
        for k in range(num_degrees % 2, num_degrees - 1, 2):
            total += term
            term *= math.cos(theta) ** 2 * (k + 1) / (k + 2)
        if num_degrees % 2:
            return 2 / math.pi * (theta + math.sin(theta) * total)
        return math.sin(theta) * total

    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if coverage_at(middle) < coverage else (low, middle)
    return math.sqrt(num_degrees) * math.tan((low + high) / 2)


def log_interval(values: Sequence[float | None]) -> Interval:
    """Mean and 95% t-interval of the logarithms of paired per-seed `values`, turned back into ratios.

    One unknown value makes all of it unknown: leaving a censored seed out would bias the mean towards the seeds that
    happen to be measurable. A single seed has a mean and no interval.
    """
    known = [math.log(value) for value in values if value is not None]
    if not known or len(known) < len(values):
        return Interval(None, None, None)
    count = len(known)
    mean = sum(known) / count
    if count == 1:
        return Interval(math.exp(mean), None, None)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in known) / (count - 1))
    half = t_quantile(count - 1) * deviation / math.sqrt(count)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def _crossing(tokens: Sequence[float], losses: Sequence[float], target: float) -> tuple[float, float] | None:
    """Tokens at which the curve first reaches `target`, and the factor between the points around it; never outside."""
    at = first_crossing(tokens, losses, target)
    if at is None:
        return None
    left = max((t for t in tokens if t <= at), default=at)
    right = min((t for t in tokens if t >= at), default=at)
    return at, right / left


def paired_ratio(reference: Mapping[float, float], arm: Mapping[float, float], seed: int) -> SeedRatio:
    """The token ratio of one seed from two curves {tokens: loss}.

    The target is the reference's loss at its largest budget; the arm's curve tells at how many tokens it gets there. An
    arm that does not get there is measured the other way: its own last loss is the target, and the reference's curve
    tells at how many tokens the reference was that good. Outside of both curves the ratio is censored.

    For the budget method a point is the end of a run with its own decayed schedule; for the in-run method it is one
    evaluation along one run.
    """
    if not reference or not arm:
        return SeedRatio(seed, note="no measurement")
    ref_tokens, ref_losses = _sorted(reference)
    if not math.isfinite(ref_losses[-1]):
        return SeedRatio(seed, note=f"the reference's run of {ref_tokens[-1]:,.0f} tokens failed")
    arm_tokens, arm_losses = _sorted({t: loss for t, loss in arm.items() if math.isfinite(loss)})
    if not arm_tokens or arm_tokens[-1] < max(arm):
        return SeedRatio(seed, note=f"the arm's run of {max(arm):,.0f} tokens failed")

    last, target = ref_tokens[-1], ref_losses[-1]
    if arm_losses[0] < target:
        return SeedRatio(seed, None, ">", last / arm_tokens[0], target)
    if found := _crossing(arm_tokens, arm_losses, target):
        at, gap = found
        return SeedRatio(seed, last / at, None, None, target, "arm", gap, at, last)

    end, target = arm_tokens[-1], arm_losses[-1]
    ref_tokens, ref_losses = _sorted({t: loss for t, loss in reference.items() if math.isfinite(loss)})
    if found := _crossing(ref_tokens, ref_losses, target):
        at, gap = found
        return SeedRatio(seed, at / end, None, None, target, "reference", gap, end, at)
    return SeedRatio(seed, None, "<", ref_tokens[0] / end, target)


def _sorted(curve: Mapping[float, float]) -> tuple[list[float], list[float]]:
    tokens = sorted(curve)
    return tokens, [curve[t] for t in tokens]


def summarise(
    arm: str, method: Method, per_seed: Sequence[SeedRatio], seconds_factors: Sequence[float | None]
) -> dict[str, Any]:
    """One entry of `ratios` in compare.json.

    `seconds_factors`: for each seed the reference's seconds per token over the arm's, which turns a token ratio into a
    wall-clock ratio. `bound` is set where seeds are censored to one side: the geometric mean with the bounds put in.
    """
    total = log_interval([s.ratio for s in per_seed])
    clock = log_interval(
        [s.ratio * f if s.ratio is not None and f is not None else None for s, f in zip(per_seed, seconds_factors)]
    )
    targets = [s.target_loss for s in per_seed if s.target_loss is not None]
    return {
        "arm": arm,
        "method": method,
        "target_loss": sum(targets) / len(targets) if targets else None,
        "per_seed": [asdict(s) for s in per_seed],
        **asdict(total),
        "num_seeds": len(per_seed),
        "bound": _common_bound(per_seed),
        "wall_clock": asdict(clock),
    }


def _common_bound(per_seed: Sequence[SeedRatio]) -> dict[str, Any] | None:
    signs = {s.censored for s in per_seed} - {None}
    values = [s.ratio if s.ratio is not None else s.bound for s in per_seed]
    if len(signs) != 1 or None in values:
        return None
    logs = [math.log(v) for v in values if v is not None]
    return {"sign": signs.pop(), "value": math.exp(sum(logs) / len(logs))}
