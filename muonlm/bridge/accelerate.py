"""Muon under accelerate: an optimizer whose parameters accelerate may still shard, and guards against what it ignores.

    accelerator = Accelerator()
    model, optimizer, loader = prepare(accelerator, model, loader, grad_clip=1.0, lr=4e-3)

accelerate takes the optimizer before it shards the model with FSDP2, and then puts the sharded parameters into the
optimizer's groups; `DeferredMuon` waits for them. Several of accelerate's settings have no effect in some surroundings
and say nothing: a run then trains, on one process or without averaging gradients. `check_accelerator` refuses those.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.config.optim import AdamWConfig, MuonConfig
from muonlm.dist import collectives
from muonlm.dist.precision import bfloat16_is_fast
from muonlm.optim.build import build_optimizer, settings
from muonlm.optim.gradients import GradNorms
from muonlm.optim.groups import check_numbers
from muonlm.optim.muon import Muon
from muonlm.optim.rules import assign_rules, groups_of

# What starts several processes says so here; accelerate reads them on CPUs only.
_TASK_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_PLUGINS = {
    "FSDP": ("ACCELERATE_USE_FSDP", "FSDP"),
    "DeepSpeed": ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"),
    "Megatron-LM": ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM"),
}


def prepare(
    accelerator: Any,
    model: nn.Module,
    *others: Any,
    config: MuonConfig | AdamWConfig | None = None,
    grad_clip: float = 0.0,
    **options: Any,
) -> tuple[Any, ...]:
    """`accelerator.prepare` of a model, Muon for it, and `others`; returns them in this order. Called by all ranks.

    Settings are a configuration, or the fields of a `MuonConfig` as `options`; parameters get their rules by role, as
    `muonlm train` gives them. Without sharding, with DistributedDataParallel, FSDP2 or DeepSpeed, whose optimizer is
    that of `muonlm.bridge.deepspeed`. `grad_clip` is the largest norm of the gradients of AdamW groups together: a Muon
    step does not depend on the norm. Collectives: a broadcast of one flag, and accelerate's own. Raises UserError where
    `check_accelerator` does, for options that do not exist, and for parameters that no rule describes.
    """
    check_accelerator(accelerator)
    chosen = settings(config, options)
    if _type_name(accelerator.state) != "DEEPSPEED":
        optimizer = DeferredMuon(model, chosen, grad_clip=grad_clip, device=accelerator.device)
        return tuple(accelerator.prepare(model, optimizer, *others))
    _check_deepspeed_clipping(accelerator.state.deepspeed_plugin.deepspeed_config, grad_clip)
    from muonlm.bridge.deepspeed import bind, muon_for_deepspeed

    engine, *rest = accelerator.prepare(model, muon_for_deepspeed(model, chosen), *others)
    bind(engine)
    return engine, *rest


def _check_deepspeed_clipping(config: Mapping[str, Any], grad_clip: float) -> None:
    if grad_clip or config.get("gradient_clipping", "auto") in ("auto", None):
        raise UserError(
            "DeepSpeed clips the gradients of all parameters together, those under Muon too, and where its "
            "configuration leaves gradient_clipping open, accelerate puts 1.0: set it there, 0.0 for none, and leave "
            "out grad_clip"
        )


def check_accelerator(accelerator: Any) -> None:
    """Raise UserError where accelerate does something else than was asked for without saying so.

    `accelerator` is an Accelerator or its state. What is refused, each with what to do: a launcher's processes that do
    not know of each other, processes between which no gradients are averaged, plugins that have no effect, and
    sharding that leaves no matrices (FSDP1) or is not known here (Megatron-LM).
    """
    state = getattr(accelerator, "state", accelerator)
    problems = [*_process_problems(state), *_plugin_problems(state)]
    if problems:
        raise UserError("accelerate would not train what was asked for:\n" + "\n".join(f"  {p}" for p in problems))


def _process_problems(state: Any) -> Iterator[str]:
    size, kind = state.num_processes, _type_name(state)
    started = {name: int(value) for name in _TASK_COUNTS if (value := os.environ.get(name, "")).isdigit()}
    name = max(started, key=lambda name: started[name], default="")
    if name and started[name] > size:
        yield (
            f"{name} says that {started[name]} processes were started, and accelerate knows of {size}: each would "
            "train a model of its own on the same data. On CPUs pass Accelerator(cpu=True), with the DeepSpeed plugin "
            "Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend='gloo')]); for the Trainer use_cpu=True; "
            "and start with torchrun"
        )
    elif size == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and not started:
        # `accelerate launch` sets the first always, the second where it was asked for several processes; torchrun,
        # which it uses on GPUs, sets WORLD_SIZE besides.
        yield (
            "accelerate launch was asked for several processes and has started one, as it does on CPUs without mpirun. "
            "Start with: torchrun --nproc_per_node N script.py (or unset MASTER_ADDR if one process is meant)"
        )
    if size > 1 and kind == "NO":
        yield (
            f"{size} processes take part, but accelerate is set up for one (distributed_type NO) and would not "
            "average gradients: InitProcessGroupKwargs alone joins them and no more. On CPUs pass Accelerator(cpu=True)"
        )


def _plugin_problems(state: Any) -> Iterator[str]:
    kind = _type_name(state)
    for plugin, (variable, expected) in _PLUGINS.items():
        is_asked = os.environ.get(variable, "false").lower() in ("true", "1")
        if is_asked and kind != expected:
            yield (
                f"{plugin} was asked for and has no effect (distributed_type {kind}): accelerate shards only on "
                "accelerators it knows, and ignores plugins with cpu=True. Leave the plugin out to train with "
                "DistributedDataParallel; on CPUs `muonlm train` shards with dist.zero, and DeepSpeed needs "
                "InitProcessGroupKwargs(backend='gloo') in place of cpu=True"
            )
    if kind == "FSDP" and (version := state.fsdp_plugin.fsdp_version) != 2:
        yield (
            f"FSDP version {version} flattens parameters, which leaves Muon no matrices; pass "
            "FullyShardedDataParallelPlugin(fsdp_version=2), for the Trainer fsdp_config={'version': 2}"
        )
    if kind == "MEGATRON_LM":
        yield "Muon is not known to Megatron-LM's engine under accelerate; use FSDP2 or DeepSpeed"


def _type_name(state: Any) -> str:
    """The name of accelerate's DistributedType."""
    return str(getattr(state.distributed_type, "value", state.distributed_type))


class DeferredMuon(torch.optim.Optimizer):
    """Muon for all trainable parameters of a model that may be sharded before the first step.

    Groups, with `name`, `rule`, `lr` and so on, are there from the start, those under Muon first: schedules multiply
    each group's `lr`, and what shows one learning rate shows Muon's. `muon`, with its state, is made from the
    parameters that the groups have when state is first needed: a step, or a checkpoint that is loaded. `state_dict` is
    Muon's without the splits of weights, which follow from the model, so that torch.load(weights_only=True) reads it.

    `device` is where Newton-Schulz runs; a probe of it on rank 0 decides "auto" precision. Collectives at construction:
    one broadcast of a flag. Raises what `assign_rules` raises.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        config: MuonConfig | AdamWConfig,
        *,
        grad_clip: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        check_numbers(grad_clip=grad_clip)
        self.config, self.grad_clip = config, grad_clip
        self.muon: Muon | None = None
        self._is_complete = False
        named = dict(model.named_parameters())
        self.rules = sorted(assign_rules(model, config), key=lambda rule: rule.rule != "muon")
        probed = device or next(iter(named.values())).device
        is_fast = collectives.broadcast_object(bfloat16_is_fast(probed))
        self._iterate_dtype = torch.bfloat16 if is_fast else torch.float32
        groups = [
            {"name": name, "params": [(rule.name, named[rule.name]) for rule in members], **members[0].options()}
            for name, members in groups_of(self.rules).items()
        ]
        # Some schedules of transformers divide by the default learning rate.
        super().__init__(groups, {"lr": config.lr})
        self._is_complete = True

    def bound(self) -> Muon:
        """The optimizer at work, made now if it was not yet. Communicates nothing.

        Raises UserError when parameters were replaced after it was made.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        if self.muon is None:
            names = [rule.name for group in groups_of(self.rules).values() for rule in group]
            muon = build_optimizer(
                _Parameters(dict(zip(names, params, strict=True))),
                self.config,
                iterate_dtype=self._iterate_dtype,
                rules=self.rules,
            )
            muon.grad_clip = self.grad_clip
            for own, group in zip(self.param_groups, muon.param_groups, strict=True):
                own.update({key: value for key, value in group.items() if key not in own})
            # The same groups for both: schedules have written into these, and may keep them.
            muon.param_groups = self.param_groups
            self.muon = muon
        elif not all(param in self.muon.state for param in params):
            raise UserError(
                "the optimizer's parameters were replaced after its first use; give model and optimizer to "
                "accelerator.prepare together, before anything else is done with them. Nothing was updated"
            )
        return self.muon

    @property
    def state(self) -> Any:
        """State of each parameter, allocated now if it was not yet."""
        return self.bound().state

    @state.setter
    def state(self, value: Any) -> None:
        """Set by torch, which begins with no state."""
        if self.muon is not None:
            self.muon.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, during construction. Raises UserError later."""
        if self._is_complete:
            raise UserError("the groups of this optimizer are those of its model; build it anew for another model")
        super().add_param_group(param_group)

    def clip_gradients(self, max_norm: float = 0.0) -> GradNorms:
        """Measure gradient norms by group and clip those of AdamW groups: `Muon.clip_gradients`."""
        return self.bound().clip_gradients(max_norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update: `Muon.step`."""
        muon = self.bound()
        for key in ("grad_scale", "found_inf"):  # left here by torch.amp.GradScaler
            setattr(muon, key, getattr(self, key, None))
        return muon.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch."""
        if self.muon is None:
            super().zero_grad(set_to_none)
        else:
            self.muon.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As in torch; before the first use empty: accelerate reads and writes it back before it shards the model."""
        if self.muon is None:
            return {"state": {}, "param_groups": []}
        saved = self.muon.state_dict()
        groups = [{key: value for key, value in g.items() if key != "split"} for g in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. Raises UserError for the state of other groups."""
        if self.muon is None and not state_dict["state"]:
            return
        muon = self.bound()
        theirs, ours = ([g.get("name") for g in groups] for groups in (state_dict["param_groups"], muon.param_groups))
        if theirs != ours:
            raise UserError(f"this state is of parameter groups {theirs}, the optimizer has {ours}")
        groups = [
            {**saved, "split": own["split"]}
            for saved, own in zip(state_dict["param_groups"], muon.param_groups, strict=True)
        ]
        muon.load_state_dict({**state_dict, "param_groups": groups})
        self.param_groups = muon.param_groups


class _Parameters(nn.Module):
    """Parameters under names with dots in them: what `build_optimizer` needs of a model."""

    def __init__(self, named: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = named

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters."""
        yield from self._named.items()
