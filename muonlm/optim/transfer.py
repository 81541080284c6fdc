"""Learning rates that transfer over width: tuned at a base width, carried over to the width of the model.

Nothing is multiplied in the forward pass: with the initial values of `muonlm.model.transfer`, learning rates alone do
it, so that a trained model is an ordinary one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from muonlm.config.optim import Role
from muonlm.optim.rules import ParamRule
from muonlm.optim.scaling import update_scale

# Both dims grow with the width.
_INNER: tuple[Role, ...] = ("hidden", "experts", "convolution")
# The input grows with the width; the output is as wide as the vocabulary or the number of experts.
_OUTPUTS: tuple[Role, ...] = ("head", "router")


def transferred(rules: Sequence[ParamRule], width_ratio: float) -> list[ParamRule]:
    """The rules with learning rates, tuned at another width, for a model that is `width_ratio` times as wide.

    Weight decay changes inversely, so that lr * weight_decay, which says over how many steps the weights forget, stays
    (X. Wang and L. Aitchison, arXiv:2405.13698). Where parameters of one group come to differ, the groups are named
    after the roles too: `mine.hidden`, `mine.head`.
    """
    factors = [lr_factor(rule, width_ratio) for rule in rules]
    by_group: dict[str, set[float]] = {}
    for rule, factor in zip(rules, factors, strict=True):
        by_group.setdefault(rule.group, set()).add(factor)
    return [
        replace(
            rule,
            lr=rule.lr * factor,
            weight_decay=rule.weight_decay / factor,
            group=rule.group if len(by_group[rule.group]) == 1 else f"{rule.group}.{rule.role or 'other'}",
        )
        for rule, factor in zip(rules, factors, strict=True)
    ]


def lr_factor(rule: ParamRule, width_ratio: float) -> float:
    """Factor on the learning rate of one parameter, 1 at a `width_ratio` of 1.

    Under AdamW the change of an output sums over inputs that agree in sign, so that 1 / width_ratio keeps it for
    matrices whose input grows; embedding, norms and biases keep their learning rate (G. Yang et al., arXiv:2203.03466,
    table 3). Under Muon the operator norm of the update has to follow sqrt(out / in) (G. Yang et al.,
    arXiv:2310.17813): scaling "spectral" does so by itself, and the others are brought to it.
    """
    if rule.rule == "adamw":
        return 1 / width_ratio if rule.role in (*_INNER, *_OUTPUTS) else 1.0
    assert rule.scaling is not None, "what is under Muon has a scaling"
    if rule.role not in _OUTPUTS:
        return 1 / math.sqrt(width_ratio) if rule.scaling == "rms_adamw" else 1.0
    rows, columns = rule.shape
    given = update_scale(rule.scaling, rows, columns) / update_scale(rule.scaling, rows, columns / width_ratio)
    return 1 / (math.sqrt(width_ratio) * given)
