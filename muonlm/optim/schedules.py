"""Learning-rate schedules: a multiplier in [0, 1] on every group's peak learning rate."""

from __future__ import annotations

import math

import torch

from muonlm.config.schema import ScheduleConfig
from muonlm.optim.stepping import StepOptimizer


def lr_multiplier(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """The multiplier of optimizer step `step`, counted from 0, of a run of `num_steps`.

    Warm-up rises linearly and reaches 1 at step `warmup_steps`, its first step being 1 / (warmup_steps + 1), so that
    no step is wasted at 0. wsd: constant, then linear decay over the last `decay_fraction` of the run; cosine and
    linear decay over all of the run after the warm-up. A decay of n steps ends one n-th above `final_ratio`, at which
    the step after the last would stand.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.kind == "wsd":
        decay_steps = round(config.decay_fraction * num_steps)
    else:
        decay_steps = max(num_steps - config.warmup_steps, 1)
    left = min(1.0, (num_steps - step) / decay_steps) if decay_steps else 1.0
    if config.kind == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return warmup * (config.final_ratio + (1 - config.final_ratio) * max(left, 0.0))


def set_learning_rates(optimizer: torch.optim.Optimizer | StepOptimizer, multiplier: float) -> None:
    """Set every group's `lr` to `base_lr` times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * multiplier
