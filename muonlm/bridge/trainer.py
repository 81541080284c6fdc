"""Muon in the Trainer of transformers, which then makes schedules, saves and resumes as with its own optimizers.

    args = TrainingArguments(..., max_grad_norm=0.0)
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=muon_for_trainer(args, grad_clip=1.0, lr=4e-3))

Needs the `evaluation` extra.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import nn

from muonlm.bridge.accelerate import DeferredMuon, check_accelerator
from muonlm.config.errors import UserError
from muonlm.config.optim import AdamWConfig, MuonConfig
from muonlm.optim.build import settings
from muonlm.optim.groups import check_numbers

# Fields of TrainingArguments that are meant for the Trainer's own optimizers -> what to do instead.
_IGNORED = {
    "learning_rate": "give muon_for_trainer lr=..., and aux={'lr': ...} for AdamW groups",
    "weight_decay": "give muon_for_trainer weight_decay=..., and aux={'weight_decay': ...} for AdamW groups",
    "adam_beta1": "give muon_for_trainer aux={'beta1': ...}",
    "adam_beta2": "give muon_for_trainer aux={'beta2': ...}",
    "adam_epsilon": "give muon_for_trainer aux={'eps': ...}",
    "optim": "leave it out",
    "optim_args": "give muon_for_trainer options of its own",
}


def muon_for_trainer(
    args: Any,
    config: MuonConfig | AdamWConfig | None = None,
    *,
    grad_clip: float = 0.0,
    **options: Any,
) -> tuple[Callable[[], Callable[..., DeferredMuon]], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, for a Trainer with these TrainingArguments.

    Settings are a configuration, or the fields of a `MuonConfig` as `options`: `muon_for_trainer(args, lr=4e-3,
    aux={"lr": 1.6e-2})`. The Trainer's schedule multiplies the learning rate of each group. `grad_clip` is the largest
    norm of the gradients of AdamW groups together: the Trainer's own clipping is refused, since it scales gradients
    under Muon by the norm of all of them, which no Muon step shows and which its momentum keeps.

    Raises UserError for options that do not exist, lists arguments that would be ignored or change Muon's momentum, and
    for a transformers whose Trainer takes classes of optimizers only.
    """
    try:
        from transformers.trainer_optimizer import is_optimizer_factory  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the Trainer of this transformers takes classes of optimizers only; pip install 'transformers>=5.23'"
        ) from error
    chosen = settings(config, options)
    check_numbers(grad_clip=grad_clip)
    _check_arguments(args)
    return _factory, {"config": chosen, "grad_clip": grad_clip}


def _factory() -> Callable[..., DeferredMuon]:
    """Called by the Trainer, which takes whatever is no optimizer's class for a maker of makers."""
    return _make


def _make(model: nn.Module, config: MuonConfig | AdamWConfig, grad_clip: float) -> DeferredMuon:
    """The optimizer for the Trainer's model, in the surroundings that accelerate has found by now."""
    from accelerate.state import AcceleratorState

    state = AcceleratorState()
    check_accelerator(state)
    if getattr(state, "deepspeed_plugins", None) is not None:
        raise UserError(
            "the Trainer loads checkpoints before Muon could be bound to DeepSpeed's partitions; train with FSDP2 "
            "(fsdp=True), or with DeepSpeed in a loop of accelerate: muonlm.bridge.accelerate.prepare"
        )
    return DeferredMuon(model, config, grad_clip=grad_clip, device=state.device)


def _check_arguments(args: Any) -> None:
    defaults = {field.name: field.default for field in fields(args)}
    problems = [
        f"  {name}={getattr(value, 'value', value)} would be ignored; {where}"
        for name, where in _IGNORED.items()
        if (value := getattr(args, name, defaults.get(name))) != defaults.get(name)
    ]
    if args.max_grad_norm:
        problems.append(
            f"  max_grad_norm={args.max_grad_norm} would weigh gradients in Muon's momentum by the norm of all; pass "
            f"max_grad_norm=0.0 and, for AdamW groups, muon_for_trainer(..., grad_clip={args.max_grad_norm})"
        )
    if problems:
        raise UserError("these TrainingArguments do not go with Muon:\n" + "\n".join(problems))
