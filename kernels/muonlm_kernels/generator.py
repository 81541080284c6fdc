"""Coefficients made here: the minimax composition of odd quintics, of any length, for any range of singular values.

N. Amsel, D. Persson, C. Musco, R. Gower, "The Polar Express" (arXiv 2505.16932), show that the composition of `steps`
odd quintics that brings every x of [lower, 1] nearest to 1, in the worst case, is made greedily: each quintic is the
minimax approximation of the constant 1 on the interval that the one before it leaves. Such a quintic equioscillates in
four points, which the Remez exchange finds in a few rounds.

The exchange runs in a basis of its own. With y = x / middle and w = 1 - y^2, the polynomials

    y (1 + w/2 + 3 w^2/8),    y w,    y w^2

span the odd quintics; the first meets 1 to third order at y = 1. Near convergence the usual basis x, x^3, x^5 almost
cancels. Here every quantity stays accurate to rounding: the error of the seventh quintic for lower = 1e-3 comes out as
8.6e-10 and not as noise.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

# (a, b, c) of one step X <- a X + b (X X^T) X + c (X X^T)^2 X.
Triple = tuple[float, float, float]

SMALLEST_LOWER, LARGEST_LOWER, MOST_STEPS = 1e-7, 0.9, 12

# The cushion behind the published table for lower = 1e-3.
PUBLISHED_CUSHION = 0.02407327424182761

# Half the spacing of float64 at 1: a quintic whose error is smaller has converged.
ROUNDING = 2.0**-53

# What the composition converges to: the odd quintic that meets 1 at x = 1 to third order.
CONVERGED: Triple = (15 / 8, -10 / 8, 3 / 8)


@lru_cache(maxsize=128)
def polar_express(
    lower: float,
    steps: int,
    *,
    safety: float = 1.01,
    cushion: float = PUBLISHED_CUSHION,
    guard: Literal["after", "within"] = "after",
) -> tuple[Triple, ...]:
    """The (a, b, c) of each step of the minimax composition for singular values in [lower, 1].

    `cushion`: no quintic is fitted below this fraction of its interval's upper end, which bounds the slopes and keeps
    small singular values in order; 0 turns it off. The quintic is then scaled so that what it makes of the whole
    interval is centred at 1.
    `safety` s guards against singular values that rounding has pushed above the interval: a triple becomes
    (a/s, b/s^3, c/s^5), the same polynomial of x/s. With guard "after" the finished triples are divided, but the
    converged ones, which are flat at 1; this is the published table. With "within" each interval is the one that the
    guarded quintic before it leaves, and the last quintic is not guarded; this is the five-step table for s = 1.02 that
    speedruns use, who divide the input by s too.

    Raises ValueError for a lower bound outside [1e-7, 0.9], steps outside 1..12, safety outside [1, 1.5], a cushion
    outside [0, 0.5] or an unknown guard.
    """
    _check(lower, steps, safety, cushion, guard)
    triples: list[Triple] = []
    low, high = lower, 1.0
    for step in range(steps):
        triple, error = _minimax_quintic(max(low, cushion * high), high)
        if error < ROUNDING:
            triples += [CONVERGED] * (steps - step)
            break
        # 1 - error keeps the digits of a small error, the evaluation those of a small floor.
        floor = 1 - error if error < 0.5 and low >= cushion * high else evaluate(triple, low)
        scale = 2 / (floor + 1 + error)
        triple = (triple[0] * scale, triple[1] * scale, triple[2] * scale)
        if guard == "within" and step < steps - 1:
            triple = guarded(triple, safety)
            low = evaluate(triple, low)
        else:
            low = scale * floor
        high = 2 - low
        triples.append(triple)
    if guard == "after":
        return tuple(triple if triple == CONVERGED else guarded(triple, safety) for triple in triples)
    return tuple(triples)


def guarded(triple: Triple, safety: float) -> Triple:
    """The polynomial of x / safety in place of x."""
    a, b, c = triple
    return (a / safety, b / safety**3, c / safety**5)


def evaluate(triple: Triple, x: float) -> float:
    """a x + b x^3 + c x^5: what one step makes of the singular value x."""
    a, b, c = triple
    square = x * x
    return x * (a + square * (b + square * c))


def _check(lower: float, steps: int, safety: float, cushion: float, guard: str) -> None:
    if not SMALLEST_LOWER <= lower <= LARGEST_LOWER:
        raise ValueError(f"polar_express: lower is {lower}; give a number in [{SMALLEST_LOWER}, {LARGEST_LOWER}]")
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"polar_express: steps is {steps}; give a number in 1..{MOST_STEPS}")
    if not 1 <= safety <= 1.5:
        raise ValueError(f"polar_express: safety is {safety}; give a number in [1, 1.5]")
    if not 0 <= cushion <= 0.5:
        raise ValueError(f"polar_express: cushion is {cushion}; give a number in [0, 0.5]")
    if guard not in ("after", "within"):
        raise ValueError(f"polar_express: guard is {guard!r}; give 'after' or 'within'")


def _minimax_quintic(low: float, high: float) -> tuple[Triple, float]:
    """The odd quintic nearest to 1 on [low, high], and its largest distance E from 1.

    It takes the values 1 - E, 1 + E, 1 - E, 1 + E at low, its two stationary points and high. The exchange solves for
    these with the stationary points fixed, then moves them.
    """
    middle = (low + high) / 2
    if low == high:
        return _in_powers(1.0, 0.0, 0.0, middle), 0.0
    # Each node as w = 1 - (x / middle)^2, without cancellation for nodes near the middle.
    ends_and_quarters = (low, (3 * low + high) / 4, (low + 3 * high) / 4, high)
    nodes = [(middle - x) * (middle + x) / middle**2 for x in ends_and_quarters]
    span = max(nodes[0], -nodes[3])
    error = math.inf
    for _ in range(50):
        previous = error
        rows = []
        for node, sign in zip(nodes, (1, -1, 1, -1), strict=True):
            y = math.sqrt(1 - node)
            short = (node / (1 + y)) ** 3 * (8 + 9 * y + 3 * y * y) / 8  # 1 - y (1 + w/2 + 3 w^2/8)
            u = node / span
            rows.append([1 - short, y * u, y * u * u, float(sign), short])
        alpha, beta, gamma, error = _solve(rows)
        if abs(error - previous) <= 1e-14 * abs(error):
            break
        # The derivative with respect to y, (15/8 (1 + alpha) + 5 gamma) w^2 + (3 beta - 4 gamma) w - 2 beta with beta
        # and gamma of w, is a quadratic whose roots are the new inner nodes; here as one in u.
        square = 15 / 8 * (1 + alpha) * span**2 + 5 * gamma
        linear, constant = 3 * beta - 4 * gamma / span, -2 * beta / span
        half = -(linear + math.copysign(math.sqrt(linear**2 - 4 * square * constant), linear)) / 2
        nodes[1:3] = sorted((half / square * span, constant / half * span), reverse=True)
    return _in_powers(1 + alpha, beta / span, gamma / span**2, middle), error


def _in_powers(first: float, second: float, third: float, middle: float) -> Triple:
    """The coefficients of x, x^3, x^5, from those of the basis of `_minimax_quintic`."""
    a = 15 / 8 * first + second + third
    b = -10 / 8 * first - second - 2 * third
    c = 3 / 8 * first + third
    return (a / middle, b / middle**3, c / middle**5)


def _solve(rows: list[list[float]]) -> list[float]:
    """The solution of the small linear system whose rows end in their right-hand side, by elimination with pivots.

    Plain Python, so that importing the coefficients runs no tensor code and depends on no default device.
    """
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda index: abs(rows[index][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for index in range(size):
            if index != column:
                factor = rows[index][column] / rows[column][column]
                rows[index] = [x - factor * y for x, y in zip(rows[index], rows[column], strict=True)]
    return [rows[index][size] / rows[index][index] for index in range(size)]
