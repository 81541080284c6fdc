"""Named coefficient sets of the quintic Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X.

Sources
- jordan: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); one triple for every step.
- quintic: Y. You's sequence, published with the same optimizer; the last triple repeats.
- polar_express: N. Amsel et al., "The Polar Express" (arXiv 2505.16932): the minimax-optimal composition for singular
  values in [1e-3, 1] with cushion 0.02; each triple but the repeated last one is divided by (s, s^3, s^5), s = 1.01.
"""

from __future__ import annotations

Triple = tuple[float, float, float]

_JORDAN: tuple[Triple, ...] = ((3.4445, -4.7750, 2.0315),)

_QUINTIC: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

_POLAR_EXPRESS_RAW: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_POLAR_EXPRESS_SAFETY = 1.01
_CONVERGED: Triple = (1.875, -1.25, 0.375)


def _with_safety(triple: Triple, s: float) -> Triple:
    a, b, c = triple
    return (a / s, b / s**3, c / s**5)


COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": _JORDAN,
    "quintic": _QUINTIC,
    "polar_express": (*(_with_safety(t, _POLAR_EXPRESS_SAFETY) for t in _POLAR_EXPRESS_RAW), _CONVERGED),
}


def coefficients(name: str, steps: int) -> tuple[Triple, ...]:
    """The (a, b, c) of each of `steps` iterations; the last triple of a set repeats.

    Raises ValueError for an unknown name or a step count below 1.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"unknown coefficient set {name!r}; known: {', '.join(sorted(COEFFICIENTS))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    known = COEFFICIENTS[name]
    return (known + (known[-1],) * steps)[:steps]
