"""Named coefficient sets of the Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X.

Which set for what, with the measured errors: docs/newton-schulz.md. The errors of all sets:
`python -m muonlm_kernels.bench errors`.

How many steps a set can make:
- Fewer than its own number are its first ones. They lift small singular values less and leave a wider band around 1:
  those of polar_express and cans are the optimal compositions of that length for the same lower bound, the others are
  only shorter. deepseek_v4 is refused: its last two steps are what it adds to jordan.
- More than its own number repeat the last triple, if it draws singular values to a point within 2 % of 1. Jordan's one
  triple keeps them in [0.68, 1.14] for any number of steps. Repeating cans' last would draw them to 1.028, and cubic5's
  never settles: ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from muonlm_kernels import generator
from muonlm_kernels.generator import Triple

__all__ = ["COEFFICIENTS", "DEFAULT", "CoefficientSet", "Triple", "coefficients"]

DEFAULT = "polar_express"

# Lower bound of the singular values that polar_express is made for, and its guard against rounding.
POLAR_EXPRESS_LOWER = 1e-3
POLAR_EXPRESS_SAFETY = 1.01


@dataclass(frozen=True)
class CoefficientSet:
    """One named set: its triples in order, and what may be done with them.

    steps: its own number of steps, taken where none is given. fewest: the smallest number that makes sense.
    repeats: whether the last triple may follow itself. preconditioner: what brings the singular values into (0, 1]
    before the first step: division by the Frobenius norm, or "aol", the rows of X / ||X||_F each multiplied by
    (sum_j |X X^T|_ij)^-1/2.
    """

    name: str
    triples: tuple[Triple, ...]
    steps: int
    source: str
    repeats: bool = True
    fewest: int = 1
    preconditioner: Literal["frobenius", "aol"] = "frobenius"


_JORDAN: Triple = (3.4445, -4.7750, 2.0315)

_SETS = (
    CoefficientSet(
        "jordan",
        (_JORDAN,),
        steps=5,
        source='K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024)',
    ),
    CoefficientSet(
        "polar_express",
        generator.polar_express(POLAR_EXPRESS_LOWER, 8, safety=POLAR_EXPRESS_SAFETY),
        steps=5,
        source='N. Amsel et al., "The Polar Express" (arXiv 2505.16932), made by `generator` for [1e-3, 1]',
    ),
    CoefficientSet(
        "quintic",
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        steps=5,
        source="Y. You's sequence, published in the modded-nanogpt repository (2025)",
    ),
    CoefficientSet(
        "cans",
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        steps=5,
        source="E. Grishina et al. (arXiv 2506.10935), Chebyshev-type polynomials; as in NVIDIA's Emerging-Optimizers",
        repeats=False,
    ),
    # Turns the sign of singular values above 0.88 in its first step, which AOL leaves there for rank 1 and 2: the
    # result then points against the gradient in one direction. `turbo_snapshot` does not.
    CoefficientSet(
        "turbo",
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        steps=4,
        source="T. Boissin et al., Turbo-Muon (2025), the table in flash-newton-schulz and Emerging-Optimizers",
        preconditioner="aol",
    ),
    CoefficientSet(
        "turbo_snapshot",
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        steps=4,
        source="T. Boissin et al., Turbo-Muon (2025), the table of the authors' repository at commit cdb03db",
        repeats=False,
        preconditioner="aol",
    ),
    CoefficientSet(
        "deepseek_v4",
        (_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        steps=10,
        source="DeepSeek-V4: eight steps of jordan, then two that converge to 1",
        fewest=10,
    ),
    CoefficientSet(
        "cubic5",
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        steps=5,
        source="arXiv 2606.00371; c = 0, so no product A A is needed",
        repeats=False,
    ),
)

COEFFICIENTS: dict[str, CoefficientSet] = {each.name: each for each in _SETS}


def coefficients(name: str, steps: int | None = None, *, safety: float | None = None) -> tuple[Triple, ...]:
    """The (a, b, c) of each step of a named set.

    `steps` None is the set's own number. `safety` is for polar_express, whose own is 1.01: see
    `generator.polar_express`, also for other lower bounds.

    Raises ValueError for an unknown name, a number of steps that the set cannot make, or a safety it does not have.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"unknown coefficient set {name!r}; known: {', '.join(COEFFICIENTS)}")
    found = COEFFICIENTS[name]
    count = found.steps if steps is None else steps
    if not isinstance(count, Integral) or count < 1:
        raise ValueError(f"steps is {count!r}; a whole number from 1 on is needed")
    triples = found.triples
    if safety is not None:
        if name != "polar_express":
            raise ValueError(f"{name} has no safety factor; only polar_express takes one")
        triples = generator.polar_express(POLAR_EXPRESS_LOWER, len(triples), safety=safety)
    if count < found.fewest or (count > len(triples) and not found.repeats):
        most = "" if found.repeats else f" at most {len(triples)}"
        raise ValueError(f"{name} makes at least {found.fewest}{most and ' and' + most} steps, not {count}")
    return (triples + triples[-1:] * count)[:count]
