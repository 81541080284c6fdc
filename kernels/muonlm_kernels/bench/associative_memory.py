"""`associative-memory`: what the exactness of the polar factor is worth in a one-layer associative memory.

The model of "Muon Outperforms Adam in Tail-End Associative Memory Learning" (arXiv 2509.26030), section 5: K pairs of
orthonormal embeddings, f_W(k) = softmax(O^T W E_k), trained from W = 0 by one step on L = -sum_k p_k log [f_W(k)]_k. A
share beta of the pairs has the probability alpha together. With the softmax S = J / K at W = 0 the gradient is
O (S - I) diag(p) E^T. An optimizer is good here if the step that teaches the frequent pairs teaches the rare ones too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from muonlm_kernels import oracle
from muonlm_kernels.bench.errors import DTYPES, variants
from muonlm_kernels.bench.options import writable_file
from muonlm_kernels.bench.table import table

ALPHA, BETA, EPSILON = 0.8, 0.2, 0.1
EMBEDDINGS = ("identity", "coupled", "random")

# Euler angles of the 3 x 3 blocks of the embeddings that mislead the sign of the gradient (appendix of the paper).
_COUPLED_INPUT, _COUPLED_OUTPUT = (1.715, 0.876, 3.098), (3.638, 2.949, 5.218)

_STEPS_PER_DECADE = 100


@dataclass(frozen=True)
class Outcome:
    """worst: probability of the worst pair when the best reaches 1 - EPSILON; gap: largest difference on the way."""

    worst: float
    gap: float


def associate(direction: Callable[[torch.Tensor], torch.Tensor], associations: int, embedding: str) -> Outcome:
    """One step W = -eta direction(gradient) for every step size eta; float64.

    `worst` is at the smallest eta where the best pair's probability reaches 1 - EPSILON, `gap` over all eta.
    """
    inputs_DK, outputs_DK = embeddings(embedding, associations)
    frequent = int(BETA * associations)
    p_K = torch.full((associations,), (1 - ALPHA) / (associations - frequent), dtype=torch.float64)
    p_K[:frequent] = ALPHA / frequent
    residual_KK = torch.full((associations, associations), 1 / associations, dtype=torch.float64)
    residual_KK -= torch.eye(associations, dtype=torch.float64)
    gradient_DD = outputs_DK @ (residual_KK * p_K) @ inputs_DK.mT
    logits_KK = -outputs_DK.mT @ direction(gradient_DD).double() @ inputs_DK
    logits_KK /= logits_KK.abs().max()

    def probabilities(eta: float) -> torch.Tensor:
        return torch.softmax(eta * logits_KK, dim=0).diagonal()

    gap, reached, low = 0.0, 0.0, 0.0
    for step in range(-_STEPS_PER_DECADE, 4 * _STEPS_PER_DECADE + 1):
        eta = 10 ** (step / _STEPS_PER_DECADE)
        found_K = probabilities(eta)
        gap = max(gap, float(found_K.max() - found_K.min()))
        if not reached and found_K.max() >= 1 - EPSILON:
            reached = eta
        low = low if reached else eta
    if not reached:
        return Outcome(worst=math.nan, gap=gap)
    for _ in range(50):
        middle = (low + reached) / 2
        low, reached = (low, middle) if probabilities(middle).max() >= 1 - EPSILON else (middle, reached)
    return Outcome(worst=float(probabilities(reached).min()), gap=gap)


def embeddings(kind: str, associations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal input and output embeddings (D, K), D = K: of "identity", "coupled" (K a multiple of 3) or "random".

    "coupled" is the construction in the paper where the sign of the gradient fails.
    """
    if kind == "identity":
        eye = torch.eye(associations, dtype=torch.float64)
        return eye, eye
    if kind == "coupled":
        if associations % 3:
            raise ValueError(f"coupled embeddings are blocks of 3; {associations} associations are no multiple")
        eye = torch.eye(associations // 3, dtype=torch.float64)
        return torch.kron(eye, _rotation(*_COUPLED_INPUT)), torch.kron(eye, _rotation(*_COUPLED_OUTPUT))
    generator = torch.Generator().manual_seed(0)
    square = (2, associations, associations)
    first, second = torch.linalg.qr(torch.randn(square, generator=generator, dtype=torch.float64))[0]
    return first, second


def _rotation(a: float, b: float, c: float) -> torch.Tensor:
    """The rotation R_z(a) R_y(b) R_z(c)."""

    def about_z(angle: float) -> torch.Tensor:
        cos, sin = math.cos(angle), math.sin(angle)
        return torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)

    cos, sin = math.cos(b), math.sin(b)
    about_y = torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]], dtype=torch.float64)
    return about_z(a) @ about_y @ about_z(c)


def anchors(associations: int) -> dict[str, Outcome]:
    """The exact polar factor, gradient descent, and the sign of the gradient with each kind of embedding.

    The first two do not depend on the embeddings.
    """
    found = {
        "exact polar factor": associate(oracle.polar_factor, associations, "random"),
        "gradient": associate(lambda gradient: gradient, associations, "random"),
    }
    kinds = [kind for kind in EMBEDDINGS if kind != "coupled" or associations % 3 == 0]
    return found | {f"sign, {kind}": associate(torch.sign, associations, kind) for kind in kinds}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `associative-memory`."""
    parser.add_argument("--associations", type=int, default=99, metavar="K", help="pairs, a multiple of 3 [99]")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write all figures as JSON too")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit code."""
    if args.associations < 6:
        print("associative-memory: give at least 6 associations", file=sys.stderr)
        return 2
    found = {name: {"float64": outcome} for name, outcome in anchors(args.associations).items()}
    for variant in variants():
        found[variant.label] = {}
        for name in ("fp32", "bf16"):
            direction = partial(variant.iterate, dtype=DTYPES[name], separate=False, compensated=False)
            found[variant.label][name] = associate(direction, args.associations, "random")
    print(f"one step on {args.associations} associations: probability of the worst when the best has {1 - EPSILON:g},")
    print("and the largest difference between two over all step sizes\n")
    rows = []
    for label, by_dtype in found.items():
        exact = by_dtype.get("float64") or by_dtype["fp32"]
        rounded = by_dtype.get("bf16")
        cells = [f"{exact.worst:.4f}", f"{exact.gap:.4f}"]
        cells += [f"{rounded.worst:.4f}", f"{rounded.gap:.4f}"] if rounded else ["-", "-"]
        rows.append([label, *cells])
    print(table(["direction", "worst", "difference", "worst bf16", "difference bf16"], rows))
    if args.json:
        plain = {label: {name: asdict(each) for name, each in by.items()} for label, by in found.items()}
        args.json.write_text(json.dumps(plain, indent=1) + "\n")
    return 0
