"""A partition of DeepSpeed's with what updates it, and how Muon sees the parameters in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from muonlm.bridge.deepspeed.partitions import Ranges
from muonlm.optim.layout import Layout
from muonlm.optim.muon import Muon
from muonlm.optim.shards import TensorShard
from muonlm.optim.updates import adamw_step
from muonlm.optim.zero_bucket import logical_tensor

Group = dict[str, Any]
States = Callable[[], Mapping[torch.Tensor, dict[str, Any]]]
Pending = Callable[[slice], torch.Tensor | None]


class Desk:
    """A partition's values, gradients and momentum where they are computed with during a step.

    That is in place; partitions that DeepSpeed keeps on the CPU of a machine with GPUs are brought to the GPU, as
    its collectives and Newton-Schulz run there: once the partition's bytes for each of the three, and two back.
    """

    def __init__(self, flat: torch.Tensor, pending: Pending, states: States, device: torch.device) -> None:
        self.flat, self.pending, self._states, self._device = flat, pending, states, device
        self.values: torch.Tensor | None = None
        self.grads: torch.Tensor | None = None
        self.momentum: torch.Tensor | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the partition; loading a checkpoint replaces it."""
        return self._states()[self.flat]

    def open(self) -> None:
        """Look up or fetch all three: DeepSpeed may have moved them, or loaded others, since the last step."""
        self.values = self._fetched(self.flat.detach())
        self.grads = None if self.flat.grad is None else self._fetched(self.flat.grad)
        self.momentum = self._fetched(self.state["momentum_buffer"])

    def close(self, *, keep: bool) -> None:
        """Bring back what was computed, if it is to be kept and lies elsewhere."""
        for own, used in ((self.flat.detach(), self.values), (self.state["momentum_buffer"], self.momentum)):
            if keep and used is not None and used.data_ptr() != own.data_ptr():
                own.copy_(used)
        self.values = self.grads = self.momentum = None

    def _fetched(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)


@dataclass
class PartitionShard:
    """The part of a parameter that lies in this rank's partition, flat; empty where other ranks hold all of it."""

    name: str
    shape: torch.Size
    ranges: Ranges
    part: slice
    layout: Layout
    pinned: bool
    desk: Desk

    def local(self) -> torch.Tensor:
        """The values on this rank."""
        return (self.desk.flat.detach() if self.desk.values is None else self.desk.values)[self.part]

    def grad(self) -> torch.Tensor | None:
        """Their averaged gradient, during a step as DeepSpeed has clipped it; zero for a parameter not used."""
        return self.desk.pending(self.part) if self.desk.grads is None else self.desk.grads[self.part]

    def state_like(self) -> torch.Tensor:
        """Nothing: state is kept for the partition as a whole, where DeepSpeed looks for it."""
        return self.desk.flat.new_empty(0)

    def local_state(self, state: torch.Tensor) -> torch.Tensor:
        """This parameter's part of the partition's momentum, during a step."""
        assert self.desk.momentum is not None
        return self.desk.momentum[self.part]

    def logical(self, state: torch.Tensor) -> Any:
        """Values or state of the partition as a tensor of the parameter's shape, for distributed checkpoints."""
        return logical_tensor(self.shape, self.ranges, state.detach()[self.part])


class PartitionSharding:
    """`muonlm.optim.shards.Sharding` for the Muon of one partition."""

    def __init__(self, desk: Desk, shards: Sequence[PartitionShard]) -> None:
        self._desk, self._shards = desk, {shard.name: shard for shard in shards}

    def shard(self, name: str, param: torch.Tensor) -> PartitionShard:
        """What this rank holds of the parameter of that name."""
        return self._shards[name]

    def before_step(self) -> None:
        """Bring everything to where it is computed with."""
        self._desk.open()

    def after_step(self) -> None:
        """Bring it back."""
        self._desk.close(keep=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave a step out. Gradients are DeepSpeed's and are dropped by it."""
        self._desk.close(keep=False)


class Outline(nn.Module):
    """Parameters by name and shape, without memory: what `build_optimizer` needs of a model."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self._outlines = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under the names given, which may have dots in them."""
        yield from self._outlines.items()


@dataclass
class BoundPartition:
    """A partition with what updates it.

    Fields:
        group: number of the optimizer's parameter group.
        desk: its values and state.
        shards: the parameters in it.
        muon: what updates it; None for AdamW.
    """

    group: int
    desk: Desk
    shards: Sequence[PartitionShard]
    muon: Muon | None

    @property
    def flat(self) -> torch.Tensor:
        """Its values."""
        return self.desk.flat

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of it."""
        return self.desk.state

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Keys of the state that has the partition's shape."""
        return ("exp_avg", "exp_avg_sq") if self.muon is None else ("momentum_buffer",)

    def lines(self, group: Group) -> list[str]:
        """What all ranks must have alike; `group` is the optimizer's parameter group."""
        options = ", ".join(f"{key} {value}" for key, value in group.items() if key != "params")
        return [f"{shard.name}: {shard.layout.key} under {options}" for shard in self.shards]

    def allocate(self) -> None:
        """Make the state now: DeepSpeed links it to parameters after the first step of the first partition."""
        for key in self.state_keys:
            self.state.setdefault(key, torch.zeros_like(self.flat.detach(), dtype=self._state_dtype))
        if self.muon is None:
            self.state.setdefault("step", torch.zeros((), dtype=torch.float32, device=self.flat.device))

    def step(self, group: Group) -> None:
        """One update with the options of the optimizer's parameter group.

        What lies between parameters and behind them in the partition is zero and has no gradient.
        """
        if self.muon is None:
            everything = TensorShard("", self.flat.detach(), self.shards[0].layout, pinned=False)
            everything.param.grad = self.flat.grad
            adamw_step(group, [everything], [self.state])
            return
        momentum = self.state["momentum_buffer"]
        if momentum.dtype != self._state_dtype:  # torch loads state in the precision of the values
            self.state["momentum_buffer"] = momentum.to(self._state_dtype)
        (own,) = self.muon.param_groups
        own.update({key: value for key, value in group.items() if key in own and key != "params"})
        self.muon.step()

    @property
    def _state_dtype(self) -> torch.dtype:
        if self.muon is None:
            return self.flat.dtype
        return next(iter(self.muon.state.values()))["momentum_buffer"].dtype
