"""ZeRO-1 and 2 for Muon: data parallelism in which optimizer state lies on one rank, and whole matrices have one owner.

Parameters are whole on every rank. `buckets` says who owns what. In a step, in the order in which gradients become
ready, each bucket's gradients are averaged by one reduce_scatter, which leaves every rank those of its slot, while the
backward pass goes on; the owners update their slots, and one all_gather a bucket brings the new values to all. Bytes on
a ring: (D - 1) / D of all gradients and of all parameters, padding included: those of ZeRO-AdamW.

Stage 1 accumulates whole gradients over micro-batches and reduces the sum; stage 2 reduces after every backward pass
and frees gradients as their bucket leaves, so that no rank keeps more than two buckets and its own part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.dist.agree import first_difference
from muonlm.optim.buckets import Bucket, Item, item_of, plan_buckets
from muonlm.optim.groups import stack_shape
from muonlm.optim.layout import flat_ranges
from muonlm.optim.zero_bucket import LiveBucket, ZeroShard


class ZeroDataParallel(nn.Module):
    """Wraps a module for data parallelism with ZeRO stage 1 or 2; pass it to `Muon` as `sharding`, too.

    `matrices` names the parameters that Muon updates, of which `stacks` are (E, out, in); the others are updated
    elementwise. Parameters must be contiguous plain tensors of one dtype and device; their values, and those of frozen
    parameters and buffers, are taken from rank 0. Gradients come with the backward pass, belong to the optimizer, and
    are dropped by its step: `param.grad` is None after a backward pass. Every rank must make as many of these. In
    `no_sync()` stage 1 accumulates without communication; stage 2 always reduces. torch.amp.GradScaler finds no
    gradients here: train in bfloat16 or float32.

    Collectives: one gather of names and shapes, and one broadcast for each bucket, frozen parameter and buffer at
    construction; one reduce_scatter a bucket and backward pass (stage 1: step); one all_gather a bucket and step.
    Raises UserError for parameters that cannot be laid out, and on all ranks where their models differ.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        matrices: set[str],
        stacks: frozenset[str] = frozenset(),
        stage: Literal[1, 2] = 1,
        bucket_bytes: int = 2**26,
        steps: int = 5,
    ) -> None:
        super().__init__()
        self.module, self.stage, self.stacks = module, stage, stacks
        named = [(name, param) for name, param in module.named_parameters() if param.requires_grad][::-1]
        _check(named)
        items = [item_of(p.shape, has_matrices=name in matrices, is_stack=name in stacks) for name, p in named]
        numel = max(1, bucket_bytes // named[0][1].element_size())
        self.plan = plan_buckets(items, collectives.world_size(), numel, steps)
        self._buckets: list[LiveBucket] = []
        self._shards: dict[torch.Tensor, ZeroShard] = {}
        self._is_synced, self._next, self._num_reductions = True, 0, 0
        self._is_queued, self._is_used = False, False
        _check_same_on_all_ranks([_line(name, p, name in matrices, name in stacks) for name, p in named])
        _check_names(matrices | stacks, {name for name, _ in module.named_parameters()})
        for bucket in self.plan:
            self._add(bucket, items, named)
        frozen = (param.data for param in module.parameters() if not param.requires_grad)
        for tensor in (*frozen, *module.buffers()):
            collectives.broadcast(tensor)
        module.register_load_state_dict_post_hook(self._refresh)

    def _add(self, bucket: Bucket, items: list[Item], named: list[tuple[str, nn.Parameter]]) -> None:
        members = {item: named[item] for item in sorted({entry.item for entry in bucket.entries})}
        live, number = LiveBucket(bucket, members), len(self._buckets)
        live.adopt()
        self._buckets.append(live)
        for item, (name, param) in members.items():
            ranges = tuple((e.rank, e.begin, e.end) for e in live.entries[item])
            own = [e for e in live.entries[item] if e.rank == collectives.rank()]
            part = slice(own[0].offset, own[-1].offset + own[-1].end - own[-1].begin) if own else slice(0, 0)
            matrix_numel = items[item].numel // max(1, items[item].count)
            is_whole = items[item].count > 0 and all(b % matrix_numel == e % matrix_numel == 0 for _, b, e in ranges)
            layout = flat_ranges(stack_shape(param, is_stack=name in self.stacks), ranges)
            self._shards[param] = ZeroShard(name, param, layout, is_whole, live, part, ranges)
            param.register_post_accumulate_grad_hook(self._hook(number, item))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        if torch.is_grad_enabled() and not self._is_used:
            raise UserError("no optimizer uses this engine: pass it to Muon as `sharding`, or nothing would be updated")
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside do not reduce gradients with stage 1; with stage 2 they do all the same."""
        self._is_synced = False
        try:
            yield
        finally:
            self._is_synced = True

    def shard(self, name: str, param: torch.Tensor) -> ZeroShard:
        """What this rank holds of `param`. Raises UserError for one that the module did not have."""
        self._is_used = True
        if param not in self._shards:
            raise UserError(f"{name} is no trainable parameter of the module that ZeRO was built for; build it anew")
        return self._shards[param]

    def before_step(self) -> None:
        """Reduce what the backward passes have left, and wait for all reductions. Called by all ranks.

        A rank without a backward pass since the last step takes part with zeros, so that none waits for it.
        """
        self._take_rest()
        for bucket in self._buckets:
            bucket.copy_in()
        if self._num_reductions == 0 or self._is_under_way:
            self._flush()
        for bucket in self._buckets:
            bucket.collect()

    def after_step(self) -> None:
        """Bring every rank's slots to all ranks, and drop the gradients, which belong to one step.

        One all_gather a bucket, all started before one is waited for.
        """
        pending = [collectives.start_all_gather(bucket.values, bucket.own.clone()) for bucket in self._buckets]
        for bucket, gather in zip(self._buckets, pending, strict=True):
            gather.wait()
            bucket.copy_out()
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those on their way too."""
        super().zero_grad(set_to_none)
        for bucket in self._buckets:
            bucket.forget()
        self._next, self._num_reductions, self._is_queued = 0, 0, False

    def _hook(self, number: int, item: int) -> Callable[[torch.Tensor], None]:
        def ready(_: torch.Tensor) -> None:
            if self.stage == 2 or self._is_synced:
                if not self._is_queued:
                    self._is_queued = True
                    torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
                self._buckets[number].take(item)
                # In the order of the buckets on every rank, whatever order their gradients come in.
                while self._next < len(self._buckets) and self._buckets[self._next].is_ready:
                    self._reduce_next()

        return ready

    @property
    def _is_under_way(self) -> bool:
        """Whether some buckets, but not all, have been reduced in this round, or gradients wait for it."""
        return self._next > 0 or any(bucket.is_begun for bucket in self._buckets)

    def _reduce_next(self) -> None:
        # The one before (or the last one) is waited for: what it has sent is freed, so that there are two such buffers.
        self._buckets[self._next - 1].collect()
        self._buckets[self._next].reduce()
        self._next += 1
        if self._next == len(self._buckets):
            self._next = 0
            self._num_reductions += 1

    def _end_of_backward(self) -> None:
        """Reduce what this backward pass has left, so that the next one does not overwrite it."""
        self._is_queued = False
        self._take_rest()
        if self._is_under_way:
            self._flush()

    def _take_rest(self) -> None:
        for bucket in self._buckets:
            for item, (_, param) in bucket.params.items():
                if param.grad is not None:
                    bucket.take(item)

    def _flush(self) -> None:
        """Reduce the rest of this round's buckets, complete or not."""
        for _ in range(self._next, len(self._buckets)):
            self._reduce_next()

    def _refresh(self, *_: object) -> None:
        for bucket in self._buckets:
            bucket.copy_in()


def _check(named: list[tuple[str, nn.Parameter]]) -> None:
    if not named:
        raise UserError("ZeRO: the module has no trainable parameter")
    first = named[0][1]
    for name, param in named:
        if isinstance(param, DTensor) or not param.is_contiguous():
            raise UserError(f"ZeRO 1 and 2 take plain contiguous parameters; {name} is not: use stage 3 (FSDP2)")
        if (param.dtype, param.device) != (first.dtype, first.device):
            raise UserError(
                f"ZeRO 1 and 2 take parameters of one dtype and device; {name} has {param.dtype} on {param.device}, "
                f"{named[0][0]} {first.dtype} on {first.device}"
            )


def _line(name: str, param: nn.Parameter, is_matrix: bool, is_stack: bool) -> str:
    kind = "stack" if is_stack else "matrix" if is_matrix else "elementwise"
    return f"{name} {tuple(param.shape)} {param.dtype} ({kind})"


def _check_names(given: set[str], known: set[str]) -> None:
    if unknown := sorted(given - known):
        raise UserError(f"ZeRO: the module has no parameters named {', '.join(unknown)}")


def _check_same_on_all_ranks(lines: list[str]) -> None:
    if found := first_difference(collectives.gather_objects(lines)):
        raise UserError(f"ZeRO: {found[1]}; all ranks must build the same model")
