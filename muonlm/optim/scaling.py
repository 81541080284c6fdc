"""How far a Muon step goes: named factors on the orthogonal update, and learning rates carried from one to another."""

from __future__ import annotations

import math
from typing import Literal

Scaling = Literal["jordan", "spectral", "rms_adamw"]
SCALINGS: tuple[Scaling, ...] = ("jordan", "spectral", "rms_adamw")
ADAMW_RMS = 0.2


def update_scale(scaling: Scaling, out_features: float, in_features: float) -> float:
    """Factor on the orthogonal update of an (out, in) matrix.

    jordan: sqrt(max(1, out / in)) (K. Jordan 2024). spectral: sqrt(out / in), so that the update has unit
    RMS-to-RMS operator norm (G. Yang et al., arXiv 2310.17813). rms_adamw: 0.2 sqrt(max(out, in)), the RMS that
    AdamW updates show (J. Liu et al., "Muon is scalable", arXiv 2502.16982).
    """
    match scaling:
        case "jordan":
            return math.sqrt(max(1.0, out_features / in_features))
        case "spectral":
            return math.sqrt(out_features / in_features)
        case "rms_adamw":
            return ADAMW_RMS * math.sqrt(max(out_features, in_features))
    raise ValueError(f"unknown scaling {scaling!r}; known: jordan, spectral, rms_adamw")


def update_rms(scaling: Scaling, out_features: int, in_features: int) -> float:
    """RMS of one element of a step with learning rate 1 on an (out, in) matrix of full rank.

    An orthogonal matrix has Frobenius norm sqrt(min(out, in)), so an RMS of 1 / sqrt(max(out, in)).
    """
    return update_scale(scaling, out_features, in_features) / math.sqrt(max(out_features, in_features))


def convert_learning_rate(
    lr: float, source: Scaling | Literal["adamw"], target: Scaling | Literal["adamw"], shape: tuple[int, int]
) -> float:
    """The learning rate under `target` that moves a matrix of `shape` (out, in) as far as `lr` under `source`.

    "adamw" is AdamW, whose updates have an RMS of about 0.2 (arXiv 2502.16982): the same as rms_adamw. Between other
    pairs the factor depends on the shape, so one learning rate for matrices of several shapes carries over exactly only
    where both scalings agree on their ratio; convert for the shape that most parameters have, or for each group.
    """

    def rms(scaling: Scaling | Literal["adamw"]) -> float:
        return ADAMW_RMS if scaling == "adamw" else update_rms(scaling, *shape)

    return lr * rms(source) / rms(target)
