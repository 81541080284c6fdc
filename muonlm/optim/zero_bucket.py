"""A bucket of ZeRO at work, and what this rank holds of the parameters in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard as TensorPart
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.dist.collectives import Pending
from muonlm.optim.buckets import Bucket, Entry
from muonlm.optim.layout import Layout, blocks_of_range


class LiveBucket:
    """A bucket at work: the values of all slots, this rank's gradients, and what is on its way."""

    def __init__(self, plan: Bucket, params: Mapping[int, tuple[str, nn.Parameter]]) -> None:
        self.params = params
        first = next(iter(params.values()))[1]
        self.values = first.detach().new_zeros(plan.slot * collectives.world_size())
        rank = collectives.rank()
        self.own = self.values[rank * plan.slot : (rank + 1) * plan.slot]
        self.entries: dict[int, list[Entry]] = {item: [] for item in params}
        self._parts: dict[int, list[tuple[slice, slice]]] = {item: [] for item in params}
        for entry in plan.entries:
            begin = entry.rank * plan.slot + entry.offset
            places = slice(entry.begin, entry.end), slice(begin, begin + entry.end - entry.begin)
            self.entries[entry.item].append(entry)
            self._parts[entry.item].append(places)
        self.grads: torch.Tensor | None = None
        self.with_grad: set[str] = set()
        self._waiting = set(params)
        self._send: torch.Tensor | None = None
        self._pending: tuple[Pending, torch.Tensor] | None = None

    @torch.no_grad()
    def adopt(self) -> None:
        """Move rank 0's values in here. A parameter that is not cut becomes a view, the others keep copies."""
        for item in self.params:
            self._read(item)
        collectives.broadcast(self.values)
        for item, parts in self._parts.items():
            if len(parts) == 1:
                param = self.params[item][1]
                param.data = self.values[parts[0][1]].view(param.shape)
        self.copy_out()

    @torch.no_grad()
    def copy_in(self) -> None:
        """Take the values of the parameters that are no views (any more), after something else has written them."""
        for item, parts in self._parts.items():
            param = self.params[item][1]
            if len(parts) > 1:
                self._read(item)
            elif parts and param.data_ptr() != (view := self.values[parts[0][1]]).data_ptr():
                if (param.dtype, param.device) != (view.dtype, view.device):
                    name = self.params[item][0]
                    raise UserError(
                        f"{name} became {param.dtype} on {param.device} after ZeRO was built; build it anew"
                    )
                self._read(item)
                param.data = view.view(param.shape)

    @torch.no_grad()
    def copy_out(self) -> None:
        """Give the parameters that are no views their values."""
        for item, parts in self._parts.items():
            if len(parts) > 1:
                target = self.params[item][1].data.view(-1)
                for inside, place in parts:
                    target[inside] = self.values[place]

    def _read(self, item: int) -> None:
        source = self.params[item][1].detach().reshape(-1)
        for inside, place in self._parts[item]:
            self.values[place] = source[inside]

    def take(self, item: int) -> None:
        """Copy a parameter's gradient into what will be sent, and free it."""
        name, param = self.params[item]
        assert param.grad is not None
        if self._send is None:
            self._send = torch.zeros_like(self.values)
        source = param.grad.reshape(-1)
        for inside, place in self._parts[item]:
            self._send[place] = source[inside]
        param.grad = None
        self.with_grad.add(name)
        self._waiting.discard(item)

    @property
    def is_ready(self) -> bool:
        """Whether every parameter has given its gradient since the last reduction."""
        return not self._waiting

    @property
    def is_begun(self) -> bool:
        """Whether any parameter has."""
        return self._send is not None

    def reduce(self) -> None:
        """Start to average the gradients; parameters that gave none count as zero. One reduce_scatter."""
        self.collect()
        send = self._send if self._send is not None else torch.zeros_like(self.values)
        received = torch.empty_like(self.own)
        self._pending = collectives.start_reduce_scatter(received, send, "avg"), received
        self._send, self._waiting = None, set(self.params)

    def collect(self) -> None:
        """Wait for what was reduced and add it to this rank's gradients."""
        if self._pending is None:
            return
        pending, received = self._pending
        pending.wait()
        self._pending = None
        self.grads = received if self.grads is None else self.grads.add_(received)

    def forget(self) -> None:
        """Drop gradients, those on their way too."""
        self.collect()
        self.grads, self._send, self._waiting = None, None, set(self.params)
        self.with_grad.clear()


@dataclass
class ZeroShard:
    """The part of a parameter that lies in this rank's slot of its bucket, flat; empty where another rank owns it."""

    name: str
    param: torch.Tensor
    layout: Layout
    pinned: bool
    bucket: LiveBucket
    part: slice
    ranges: tuple[tuple[int, int, int], ...]

    def local(self) -> torch.Tensor:
        """The values in this rank's slot."""
        return self.bucket.own[self.part]

    def grad(self) -> torch.Tensor | None:
        """Their averaged gradient; None where this rank's backward passes gave the parameter none."""
        if self.name not in self.bucket.with_grad or self.bucket.grads is None:
            return None
        return self.bucket.grads[self.part]

    def state_like(self) -> torch.Tensor:
        """The values in this rank's slot."""
        return self.local()

    def local_state(self, state: torch.Tensor) -> torch.Tensor:
        """The state itself: it is kept where the values are."""
        return state

    def logical(self, state: torch.Tensor) -> Any:
        """State as a tensor of the parameter's shape whose parts lie on their owners, for distributed checkpoints."""
        return logical_tensor(self.param.shape, self.ranges, state) if state.ndim else state


def logical_tensor(shape: torch.Size, ranges: Sequence[tuple[int, int, int]], own: torch.Tensor) -> ShardedTensor:
    """A tensor of which the ranks hold `ranges` (rank, begin, end), flattened; `own` has this rank's, in that order.

    torch.distributed.checkpoint saves and loads it in place. Communicates nothing.
    """
    parts, metadata, offset = [], [], 0
    for rank, begin, end in ranges:
        for start, size in blocks_of_range(shape, begin, end):
            data = ShardMetadata(list(start), list(size), f"rank:{rank}/{own.device}")
            metadata.append(data)
            if rank == collectives.rank():
                numel = torch.Size(size).numel()
                parts.append(TensorPart(own[offset : offset + numel].view(size), data))
                offset += numel
    whole = ShardedTensorMetadata(metadata, shape, TensorProperties(dtype=own.dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(parts, whole)
