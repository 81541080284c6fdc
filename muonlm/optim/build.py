"""From a model and a configuration to its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from muonlm.config.schema import AdamWConfig, MuonConfig
from muonlm.dist.precision import bfloat16_is_fast
from muonlm.optim.muon import Muon
from muonlm.optim.rules import assign_rules, named_groups


def build_optimizer(
    model: nn.Module, config: MuonConfig | AdamWConfig, *, iterate_dtype: torch.dtype | None = None
) -> Muon:
    """Muon with AdamW for the rest, or AdamW alone, with one parameter group for each role.

    Every group has `name`, `rule`, `lr` and `base_lr` (the peak that schedules multiply). `iterate_dtype` is the
    precision of Newton-Schulz where the configuration leaves it to "auto"; a probe of the device decides when it is
    None, and ranks or restarts that must agree pass it. Raises UserError when a parameter matches no rule.
    """
    rules = assign_rules(model, config)
    groups = []
    for name, members in named_groups(model, rules).items():
        rule = next(r for r in rules if r.group == name)
        group: dict[str, Any] = {
            "name": name,
            "params": members,
            "rule": rule.rule,
            "lr": rule.lr,
            "base_lr": rule.lr,
            "weight_decay": rule.weight_decay,
        }
        if rule.rule == "adamw":
            adam = config if isinstance(config, AdamWConfig) and rule.role == "hidden" else config.aux
            group.update(betas=(adam.beta1, adam.beta2), eps=adam.eps)
        groups.append(group)
    if isinstance(config, AdamWConfig):
        return Muon(groups)
    return Muon(
        groups,
        momentum=config.momentum,
        nesterov=config.nesterov,
        scaling=config.scaling,
        coefficients=config.newton_schulz.coefficients,
        steps=config.newton_schulz.steps,
        dtype=_iterate_dtype(config, model, iterate_dtype),
        compensated=config.newton_schulz.compensated,
    )


def _iterate_dtype(config: MuonConfig, model: nn.Module, decided: torch.dtype | None) -> torch.dtype:
    name = config.newton_schulz.dtype
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if decided is not None:
        return decided
    device = next(model.parameters()).device
    return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
