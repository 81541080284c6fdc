"""From a model and a configuration to its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from muonlm.config.errors import UserError
from muonlm.config.optim import AdamWConfig, MuonConfig
from muonlm.dist.precision import bfloat16_is_fast
from muonlm.optim.muon import Muon
from muonlm.optim.rules import ParamRule, assign_rules, groups_of
from muonlm.optim.shards import Sharding
from muonlm.optim.transfer import transferred

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def settings(config: MuonConfig | AdamWConfig | None, options: Mapping[str, Any]) -> MuonConfig | AdamWConfig:
    """`config`, or else a `MuonConfig` with these fields. Raises UserError for both, and for options that cannot be."""
    if config is not None:
        if options:
            raise UserError(f"give a configuration or single options, not both: {', '.join(options)}")
        return config
    try:
        return MuonConfig.model_validate(options)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"options of Muon: {problems}; see docs/config.md, optim") from None


def build_optimizer(
    model: nn.Module,
    config: MuonConfig | AdamWConfig,
    *,
    iterate_dtype: torch.dtype | None = None,
    rules: list[ParamRule] | None = None,
    width_ratio: float = 1.0,
    sharding: Sharding | None = None,
) -> Muon:
    """Muon with AdamW for the rest, or AdamW alone, with a parameter group for each role and its settings.

    Every group has `name`, `rule`, `lr` and `base_lr` (the peak that schedules multiply). `iterate_dtype` is the
    precision of Newton-Schulz where the configuration leaves it to "auto"; a probe of the device decides when it is
    None, and ranks or restarts that must agree pass it. `rules` are those of `assign_rules`, where they are known
    already; else learning rates are for a model `width_ratio` times as wide as the one they were tuned on
    (`muonlm.optim.transfer`). `sharding` is that of `Muon`. Raises what `assign_rules` raises.
    """
    params = dict(model.named_parameters())
    if rules is None:
        rules = transferred(assign_rules(model, config), width_ratio)
    groups: list[dict[str, Any]] = [
        {"name": name, "params": [(rule.name, params[rule.name]) for rule in members], **members[0].options()}
        for name, members in groups_of(rules).items()
    ]
    if isinstance(config, AdamWConfig):
        return Muon(groups, non_finite=config.non_finite, sharding=sharding)
    return Muon(
        groups,
        momentum=config.momentum,
        nesterov=config.nesterov,
        momentum_form=config.momentum_form,
        momentum_dtype=_DTYPES.get(config.momentum_dtype),
        cautious=config.cautious,
        scaling=config.scaling,
        coefficients=config.newton_schulz.coefficients,
        steps=config.newton_schulz.steps,
        dtype=_iterate_dtype(config, model, iterate_dtype),
        compensated=config.newton_schulz.compensated,
        non_finite=config.non_finite,
        bucket_bytes=config.exchange.bucket_bytes,
        depth=config.exchange.depth,
        split_min_flops=config.exchange.split_min_flops,
        sharding=sharding,
    )


def _iterate_dtype(config: MuonConfig, model: nn.Module, decided: torch.dtype | None) -> torch.dtype:
    if config.newton_schulz.dtype != "auto":
        return _DTYPES[config.newton_schulz.dtype]
    if decided is not None:
        return decided
    device = next(model.parameters()).device
    return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
