"""A model spread over the ranks with its optimizer, by the engine that the configuration names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from muonlm.bridge.pretrained import load_pretrained
from muonlm.checkpoint.store import Contents, ModelAndOptimizer
from muonlm.config.schema import TrainConfig
from muonlm.dist.agree import raised_on_all_ranks
from muonlm.dist.mesh import Mesh
from muonlm.dist.wrap import wrap
from muonlm.model.build import materialize
from muonlm.model.gpt import GPT
from muonlm.model.parallel import expert_modules, shard_layers
from muonlm.optim.build import build_optimizer
from muonlm.optim.plan import Plan
from muonlm.optim.rules import ParamRule
from muonlm.optim.shards import Sharding
from muonlm.optim.stepping import StepOptimizer
from muonlm.optim.zero import ZeroDataParallel


@dataclass(frozen=True)
class Running:
    """`wrapped` is to be called for the loss, `contents` to be saved; `plans` say who orthogonalizes what.

    `about` is for environment.json.
    """

    wrapped: nn.Module
    optimizer: StepOptimizer
    contents: Contents
    plans: tuple[Plan, ...]
    about: dict[str, Any] = field(default_factory=dict)


def start_engine(
    model: GPT,
    rules: list[ParamRule],
    mesh: Mesh,
    config: TrainConfig,
    *,
    dtype: torch.dtype,
    iterate_dtype: torch.dtype,
    micro_batch: int,
    init_from: str | None,
) -> Running:
    """Cut the outline of a model as the configuration says, and give this rank's part its values, on the device.

    `dtype` is that of the forward pass, `iterate_dtype` that of Newton-Schulz. `init_from` is a directory to take
    values from rather than the configuration's seed. Called by all ranks; raises UserError for what an engine refuses.
    """
    for block in model.blocks:
        block.set_recompute(config.loop.activation_checkpointing)
    if config.loop.compile:
        model.compile_parts()
    if config.dist.engine == "deepspeed":
        _fill(model, config, torch.device("cpu") if config.dist.zero == 3 else mesh.device, init_from)
        return _deepspeed(model, config, mesh, dtype, iterate_dtype, micro_batch)
    wrapped, sharding = _spread(model, rules, mesh, config, dtype, init_from)
    with raised_on_all_ranks():
        optimizer = build_optimizer(model, config.optim, iterate_dtype=iterate_dtype, rules=rules, sharding=sharding)
    return Running(wrapped, optimizer, ModelAndOptimizer(model, optimizer), (optimizer.plan(),))


def _deepspeed(
    model: GPT, config: TrainConfig, mesh: Mesh, dtype: torch.dtype, iterate_dtype: torch.dtype, micro_batch: int
) -> Running:
    from muonlm.bridge.deepspeed.checkpoint import EngineTensors
    from muonlm.bridge.deepspeed.training import start

    batch = {"num_ranks": mesh.data_size, "micro_batch": micro_batch}
    wrapped, optimizer = start(model, config, device=mesh.device, dtype=dtype, iterate_dtype=iterate_dtype, **batch)
    return Running(wrapped, optimizer, EngineTensors(wrapped.engine), tuple(optimizer.plans()), wrapped.about())


def _fill(model: GPT, config: TrainConfig, device: torch.device, init_from: str | None) -> None:
    materialize(model, config.seed, device)
    if init_from is not None:
        with raised_on_all_ranks():
            load_pretrained(model, init_from)


def _spread(
    model: GPT, rules: list[ParamRule], mesh: Mesh, config: TrainConfig, dtype: torch.dtype, init_from: str | None
) -> tuple[nn.Module, Sharding | None]:
    """What is to be called for the loss, and the engine that the optimizer needs to know of, if there is one."""
    dist = config.dist
    if mesh.tensor is not None or mesh.expert is not None:
        shard_layers(model, tensor=mesh.tensor, expert=mesh.expert, both=mesh.expert_and_tensor)
    if mesh.sharded is not None:
        wrap(
            *(model, model.blocks, mesh),
            experts=expert_modules(model),
            reshard_after_forward=dist.reshard_after_forward,
            gather_dtype=_gather_dtype(config, mesh, dtype),
        )
    _fill(model, config, mesh.device, init_from)
    if mesh.sharded is not None:
        return model, None
    if dist.zero in (1, 2) and mesh.data_size > 1:
        matrices = {rule.name for rule in rules if rule.rule == "muon"}
        stacks = frozenset(rule.name for rule in rules if rule.role == "experts")
        engine = ZeroDataParallel(model, matrices=matrices, stacks=stacks, stage=1 if dist.zero == 1 else 2)
        return engine, engine
    return wrap(model, model.blocks, mesh), None


def _gather_dtype(config: TrainConfig, mesh: Mesh, dtype: torch.dtype) -> torch.dtype | None:
    """None for that of the parameters, fp32."""
    wanted = config.dist.gather_dtype
    is_narrow = wanted == "bfloat16" or (wanted == "auto" and mesh.device.type == "cuda" and dtype == torch.bfloat16)
    return torch.bfloat16 if is_narrow else None
