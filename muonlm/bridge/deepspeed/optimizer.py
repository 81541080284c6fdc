"""The optimizer that DeepSpeed is given: on each of its partitions, Muon through our exchange, or AdamW.

    optimizer = muon_for_deepspeed(model, lr=4e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    bind(engine)

DeepSpeed averages, unscales and clips gradients, then calls `step` once for each of its partitions (once for all of
them, if it trains bfloat16 parameters and adds gradients up in fp32), with the partition as the one parameter there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from muonlm.bridge.deepspeed.bound import BoundPartition, Desk, Outline, PartitionShard, PartitionSharding
from muonlm.bridge.deepspeed.guards import check_engine, check_version
from muonlm.bridge.deepspeed.partitions import Partition, forget_gradients, partitions_of
from muonlm.config.errors import UserError
from muonlm.config.optim import AdamWConfig, MuonConfig
from muonlm.dist import collectives
from muonlm.dist.agree import first_difference
from muonlm.dist.precision import bfloat16_is_fast
from muonlm.optim.build import build_optimizer, settings
from muonlm.optim.gradients import NonFiniteGradient
from muonlm.optim.groups import stack_shape
from muonlm.optim.layout import flat_ranges
from muonlm.optim.muon import Muon
from muonlm.optim.plan import Plan
from muonlm.optim.rules import ParamRule, assign_rules, groups_of
from muonlm.optim.transfer import transferred


def muon_for_deepspeed(
    model: nn.Module,
    config: MuonConfig | AdamWConfig | None = None,
    *,
    iterate_dtype: torch.dtype | None = None,
    width_ratio: float = 1.0,
    **options: Any,
) -> DeepSpeedMuon:
    """The optimizer to give to `deepspeed.initialize`, for all trainable parameters of `model`; `bind` completes it.

    Settings are a `MuonConfig`, or its fields as `options`: `muon_for_deepspeed(model, lr=4e-3, aux={"lr": 1.6e-2})`.
    Parameters get their rules by role, as `muonlm train` gives them, whether they are whole or were made under
    `deepspeed.zero.Init`; `iterate_dtype` and `width_ratio` are those of `muonlm.optim.build.build_optimizer`. Raises
    UserError for options that do not exist and for parameters that no rule describes.
    """
    config = settings(config, options)
    with _shaped_as_whole(model):
        rules = transferred(assign_rules(model, config), width_ratio)
    return DeepSpeedMuon(dict(model.named_parameters()), config, rules, iterate_dtype)


def bind(engine: Any) -> DeepSpeedMuon:
    """Tell the optimizer of a DeepSpeed engine what DeepSpeed has made of its parameters; returns the optimizer.

    Called by all ranks, once, after `deepspeed.initialize` (or accelerate's `prepare`), before a checkpoint is loaded.
    Collectives: one gather of short texts. Raises UserError for versions of DeepSpeed that are not tested, for
    configurations under which something else than Muon would be trained, and where ranks differ.
    """
    check_version()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if not isinstance(optimizer, DeepSpeedMuon):
        raise UserError(
            f"the engine's optimizer is {type(optimizer).__name__}; give what muon_for_deepspeed returns to "
            "deepspeed.initialize as `optimizer`"
        )
    check_engine(engine)
    optimizer.check_knows({name: p for name, p in engine.module.named_parameters() if p.requires_grad})
    optimizer.bind(engine.optimizer)
    _forget_skipped(engine)
    return optimizer


def _forget_skipped(engine: Any) -> None:
    """Before the first forward pass after a step that DeepSpeed has left out: drop the gradients of that step."""
    seen = engine.skipped_steps

    def forget(*_: Any) -> None:
        nonlocal seen
        if engine.skipped_steps != seen:
            seen = engine.skipped_steps
            forget_gradients(engine.optimizer)

    engine.module.register_forward_pre_hook(forget)


class DeepSpeedMuon(torch.optim.Optimizer):
    """Muon and AdamW on the partitions of DeepSpeed's ZeRO; made by `muon_for_deepspeed`, completed by `bind`.

    Parameter groups are those of `muonlm.optim.build.build_optimizer`, and DeepSpeed's learning-rate schedules, which
    write `lr` into them, work. State has the shape of the partitions: `momentum_buffer` under Muon, `exp_avg`,
    `exp_avg_sq`, `step` under AdamW; DeepSpeed saves, loads and offloads it.

    `is_withheld`: steps of DeepSpeed's leave everything as it is.

    Never tag parameters with `use_muon`: DeepSpeed would take that, and the name of this class, for its own Muon.
    """

    def __init__(
        self,
        params: dict[str, torch.Tensor],
        config: MuonConfig | AdamWConfig,
        rules: Sequence[ParamRule],
        iterate_dtype: torch.dtype | None,
    ) -> None:
        self.config, self.rules = config, list(rules)
        self._iterate_dtype = iterate_dtype
        self._names = {params[rule.name]: rule.name for rule in rules}
        self._zero: Any = None
        self._bound: dict[torch.Tensor, BoundPartition] = {}
        self.num_skipped = 0
        self.is_withheld = False
        groups = [
            {"name": name, "params": [params[rule.name] for rule in members], **members[0].options()}
            for name, members in groups_of(rules).items()
        ]
        super().__init__(groups, {})

    @property
    def partitions(self) -> list[BoundPartition]:
        """This rank's partitions, in the order in which they are updated. Raises UserError before `bind`."""
        if not self._bound:
            raise UserError(_UNBOUND)
        return list(self._bound.values())

    @property
    def zero(self) -> Any:
        """DeepSpeed's own optimizer around this one. Raises UserError before `bind`."""
        if self._zero is None:
            raise UserError(_UNBOUND)
        return self._zero

    def bind(self, zero: Any) -> None:
        """Take the partitions of DeepSpeed's optimizer for the parameters, and allocate their state: see `bind`."""
        from deepspeed.accelerator import get_accelerator

        found = partitions_of(zero)
        self._check_parameters(found)
        self._zero, self.device = zero, torch.device(get_accelerator().current_device_name())
        if self._iterate_dtype is None:  # where the configuration leaves it to a probe, one rank's decides
            is_fast = collectives.broadcast_object(bfloat16_is_fast(self.device))
            self._iterate_dtype = torch.bfloat16 if is_fast else torch.float32
        self._bound = {partition.flat: self._bind_partition(partition) for partition in found}
        lines = [
            f"{self.config}",
            *(line for part in found for line in self._bound[part.flat].lines(self.param_groups[part.group])),
        ]
        if difference := first_difference(collectives.gather_objects(lines)):
            raise UserError(f"rank {difference[0]} and rank 0 differ: {difference[1]}; all ranks must build the same")

    def check_knows(self, params: Mapping[str, torch.Tensor]) -> None:
        """Raise UserError for parameters, by name, that this optimizer was not made for: nothing would train them."""
        if unknown := [name for name, param in params.items() if param not in self._names]:
            raise UserError(
                f"{', '.join(unknown[:8])}: trainable in the model, but not when muon_for_deepspeed was called, so "
                "that nothing would train it; build the optimizer last, for the model that is trained"
            )

    def _check_parameters(self, found: Sequence[Partition]) -> None:
        missing = set(self._names.values()) - {
            self._names.get(member.param, "") for partition in found for member in partition.members
        }
        if missing:
            raise UserError(
                f"DeepSpeed has {', '.join(sorted(missing)[:8])} in no partition: the model was changed after "
                "muon_for_deepspeed; build the optimizer for the model that is trained"
            )
        if tagged := [name for param, name in self._names.items() if getattr(param, "use_muon", False)]:
            raise UserError(
                f"{tagged[0]} carries `use_muon`, so DeepSpeed would orthogonalize its gradient before this optimizer "
                'does; remove the tag, and "optimizer" from the DeepSpeed configuration'
            )

    def _bind_partition(self, partition: Partition) -> BoundPartition:
        group = self.param_groups[partition.group]
        desk = Desk(partition.flat, partition.pending, lambda: self.state, self.device)
        shards = []
        for member in partition.members:
            is_stack = len(member.shape) == 3 and not group.get("convolution", False)
            stack = stack_shape(torch.empty(member.shape, device="meta"), is_stack=is_stack)
            # In stages 1 and 2 most matrices lie whole on one rank, which computes them: only cut ones travel.
            layout, pinned = flat_ranges(stack, member.ranges), partition.is_cut_at_ends
            name = self._names[member.param]
            shards.append(PartitionShard(name, member.shape, member.ranges, member.part, layout, pinned, desk))
        muon = self._muon(desk, shards) if group["rule"] == "muon" else None
        bound = BoundPartition(partition.group, desk, shards, muon)
        bound.allocate()
        return bound

    def _muon(self, desk: Desk, shards: Sequence[PartitionShard]) -> Muon:
        """Muon over the parameters of one partition, with the settings of this optimizer."""
        chosen = {shard.name for shard in shards}
        return build_optimizer(
            Outline({shard.name: shard.shape for shard in shards}),
            self.config,
            iterate_dtype=self._iterate_dtype,
            rules=[rule for rule in self.rules if rule.name in chosen],
            sharding=PartitionSharding(desk, shards),
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the partitions that DeepSpeed has put into the parameter groups. Called by DeepSpeed, on all ranks.

        Collectives: those of `Muon.step` for each Muon partition. Raises UserError for parameters that `bind` has not
        seen, and NonFiniteGradient before anything is updated, unless such steps are skipped.
        """
        assert closure is None, "DeepSpeed calls step without a closure"
        chosen = [(param, group) for group in self.param_groups for param in group["params"]]
        if not all(param in self._bound for param, _ in chosen):
            raise UserError(_UNBOUND)
        if self.is_withheld:
            pass
        elif not self._is_finite():
            if self.config.non_finite != "skip":
                raise NonFiniteGradient("the norm of all gradients is not finite; nothing was updated")
            self.num_skipped += any(self._bound[param] is self.partitions[0] for param, _ in chosen)
        else:
            for param, group in chosen:
                self._bound[param].step(group)
        if any(self._bound[param] is self.partitions[-1] for param, _ in chosen):
            forget_gradients(self.zero)

    def _is_finite(self) -> bool:
        """Whether the norm that DeepSpeed has computed of all gradients is finite; DeepSpeed says -1 where not."""
        norm = getattr(self.zero, "_global_grad_norm", None)
        return norm is None or (math.isfinite(norm := float(norm)) and norm >= 0)

    def plans(self) -> list[Plan]:
        """Who orthogonalizes what, for each Muon partition. Raises UserError before `bind`."""
        return [bound.muon.plan() for bound in self.partitions if bound.muon is not None]


_UNBOUND = (
    "call muonlm.bridge.deepspeed.bind(engine) after deepspeed.initialize: until then nobody knows which matrices this "
    "flat parameter is made of. Nothing was updated"
)


@contextmanager
def _shaped_as_whole(model: nn.Module) -> Iterator[None]:
    """Let parameters that `deepspeed.zero.Init` has partitioned, and so emptied, have their shapes, without memory."""
    emptied = [p for p in model.parameters() if hasattr(p, "ds_shape") and p.shape != p.ds_shape]
    kept = [param.data for param in emptied]
    for param in emptied:
        param.data = param.data.new_empty(1).expand(param.ds_shape)
    try:
        yield
    finally:
        for param, data in zip(emptied, kept, strict=True):
            param.data = data
