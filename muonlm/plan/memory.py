"""Bytes of a rank's memory by kind, from the configuration and the number of ranks. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

from muonlm.config.optim import MuonConfig
from muonlm.config.ranks import micro_batch_size
from muonlm.config.schema import TrainConfig
from muonlm.optim.buckets import Bucket
from muonlm.plan.activations import Activations, activations
from muonlm.plan.owners import Owners, find_owners, zero_buckets
from muonlm.plan.parameters import (
    FP32_BYTES,
    Layout,
    Weight,
    gather_bytes,
    layout_of,
    momentum_bytes,
    weights,
    wire_bytes,
)


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that has most of each kind.

    Fields:
        weights: fp32 parameters that stay; gradients: fp32 ones when the optimizer steps; optimizer_state.
        early_gradients, late_gradients: those that are there during the forward pass, and after the backward pass:
            whole ones with ZeRO-1.
        gathered, gathered_at_end: parameters that FSDP2 has whole at a time, and gradients on their way; at the end of
            the backward pass.
        exchange: what Muon's step sends, receives and computes with.
        activations: by kind.
    """

    weights: int
    gradients: int
    optimizer_state: int
    early_gradients: int
    late_gradients: int
    gathered: int
    gathered_at_end: int
    exchange: int
    activations: Activations

    @property
    def rows(self) -> dict[str, tuple[int, ...]]:
        """Bytes by kind in each of `phases`."""
        used = self.activations
        return {
            "weights": (self.weights,) * 4,
            "optimizer state": (self.optimizer_state,) * 4,
            "gradients": (self.early_gradients, self.early_gradients, self.late_gradients, self.gradients),
            "gathered parameters and reductions": (self.gathered, self.gathered, self.gathered_at_end, 0),
            "activations of blocks": (used.blocks, used.blocks, 0, 0),
            "activations of one block": (0, used.block if used.is_recomputed else 0, used.block, 0),
            "copies of weights": (used.weight_copies, used.weight_copies, 0, 0),
            "head and its gradients": (used.head, used.head, 0, 0),
            "logits": (used.logits, 0, 0, 0),
            "temporaries": (0, used.temporaries, used.temporaries, 0),
            "Muon's exchange and products": (0, 0, 0, self.exchange),
        }

    @property
    def phases(self) -> dict[str, int]:
        """Bytes where the loss is computed, where the backward pass begins and ends, and in the optimizer's step."""
        return dict(zip(PHASES, map(sum, zip(*self.rows.values(), strict=True)), strict=True))

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.phases.values())


PHASES = ("loss", "backward, begin", "backward, end", "optimizer")


@dataclass(frozen=True)
class Model:
    """What is the same for every micro-batch: a configuration on a number of ranks, its parameters and their layout.

    `device` is "cuda" or "cpu" and decides what "auto" means.
    """

    config: TrainConfig
    world_size: int
    vocab_size: int
    device: str
    layout: Layout
    weights: list[Weight] = field(repr=False)

    @cached_property
    def buckets(self) -> list[Bucket] | None:
        """ZeRO's buckets; None without, or where they would take long to plan."""
        if self.layout.engine in ("zero1", "zero2"):
            return zero_buckets(self.weights, self.layout.num_ranks)
        return None

    @cached_property
    def slots(self) -> list[int]:
        """Elements of a rank's slot of each of ZeRO's buckets; without the plan, equal parts of everything."""
        if self.buckets is not None:
            return [bucket.slot for bucket in self.buckets]
        return [-(-sum(w.numel for w in self.weights) // self.layout.num_ranks)]

    @property
    def rank_batch(self) -> int:
        """Sequences of a step on a rank."""
        return self.config.loop.batch_size // self.layout.grid.data

    @property
    def micro_batch(self) -> int:
        """Sequences of a forward pass of a rank, as configured. Raises UserError when the batch does not divide."""
        return micro_batch_size(self.config, self.layout.grid.data)

    @cached_property
    def owners(self) -> Owners:
        """Muon's balance. Where ZeRO's buckets would take long to plan, that of matrices which every rank holds."""
        is_muon = self.config.optim.kind == "muon"
        size = wire_bytes(self.config, self.device) if is_muon else FP32_BYTES
        return find_owners(self.config, self.weights, self.layout, size, self.buckets)


def make_model(config: TrainConfig, *, world_size: int, vocab_size: int, device: str) -> Model:
    """The model of a run. Raises UserError where ranks do not divide as `dist` asks.

    What DeepSpeed keeps where is much what torch's engine keeps, so that that one is planned.
    """
    if config.dist.engine != "torch":
        dist = config.dist.model_copy(update={"engine": "torch", "deepspeed_config": None})
        config = config.model_copy(update={"dist": dist})
    return Model(config, world_size, vocab_size, device, layout_of(config, world_size), weights(config, vocab_size))


def memory_of(model: Model, micro_batch: int) -> Memory:
    """Memory of a rank with micro-batches of `micro_batch` sequences.

    Left out: the allocator's fragments, the device's context, buffers of the communication library, and elementwise
    temporaries of the optimizer.
    """
    config, layout = model.config, model.layout
    gradients = FP32_BYTES * _held(model)
    early, late = _gradients(model, gradients, micro_steps=max(1, model.rank_batch // micro_batch))
    during, at_end = _gathered(model)
    return Memory(
        weights=_parameters(model),
        gradients=gradients,
        optimizer_state=_state(model),
        early_gradients=early,
        late_gradients=late,
        gathered=during,
        gathered_at_end=at_end,
        exchange=_exchange(model),
        activations=activations(config, model.weights, layout, micro_batch, model.vocab_size, model.device),
    )


def _gradients(model: Model, gradients: int, micro_steps: int) -> tuple[int, int]:
    """Bytes of gradients that are there during the forward pass, and after the backward pass.

    `gradients` are those that the optimizer sees. DistributedDataParallel keeps its buckets always; the others free
    gradients after a step, and have them during a forward pass where another one came before. ZeRO-1 has whole ones
    until they are reduced.
    """
    engine = model.layout.engine
    if engine == "ddp":
        return gradients, gradients
    if engine == "zero1":
        whole = model.layout.num_ranks * gradients
        return whole if micro_steps > 1 else 0, whole + gradients
    return gradients if micro_steps > 1 else 0, gradients


def _held(model: Model) -> int:
    """Elements of the gradients that the optimizer sees on a rank."""
    if model.layout.engine in ("zero1", "zero2"):
        return sum(model.slots)
    return sum(model.layout.local_numel(w) for w in model.weights)


def _parameters(model: Model) -> int:
    """Bytes of parameters: ZeRO-1 and 2 keep them in buckets, of which parameters that are cut are copies."""
    if model.layout.engine not in ("zero1", "zero2"):
        return FP32_BYTES * _held(model)
    copies = 0
    for bucket in model.buckets or ():
        parts: dict[int, int] = defaultdict(int)
        for entry in bucket.entries:
            parts[entry.item] += 1
        copies += sum(model.weights[-1 - item].numel for item, count in parts.items() if count > 1)
    return FP32_BYTES * (model.layout.num_ranks * sum(model.slots) + copies)


def _state(model: Model) -> int:
    """Bytes of momentum and of AdamW's two moments, on the rank with most."""
    cost = {"muon": momentum_bytes(model.config), "adamw": 2 * FP32_BYTES}
    if model.buckets is not None:
        ranks: dict[int, int] = defaultdict(int)
        for bucket in model.buckets:
            for entry in bucket.entries:
                ranks[entry.rank] += cost[model.weights[-1 - entry.item].rule] * (entry.end - entry.begin)
        return max(ranks.values())
    total = sum(cost[w.rule] * model.layout.local_numel(w) for w in model.weights)
    return -(-total // model.layout.num_ranks) if model.layout.engine in ("zero1", "zero2") else total


def _gathered(model: Model) -> tuple[int, int]:
    """Bytes of what FSDP2 gathers, and of gradients on their way: during both passes, and at the end of the backward.

    Gathered are everything outside of the blocks, and two blocks, one in use and the next, or all if they are not freed
    after the forward pass. Gradients of a block, or at the end of what is outside, are there in the dtype of the
    parameters, and in fp32 copied together to be reduced. ZeRO-2 has two buckets of gradients on their way.
    """
    layout, config = model.layout, model.config
    if layout.engine == "zero2":
        both = 2 * FP32_BYTES * layout.num_ranks * max(model.slots) if model.buckets is not None else 0
        return both, both
    if layout.engine != "fsdp":
        return 0, 0
    units: dict[int, int] = defaultdict(int)
    for weight in model.weights:
        units[weight.unit] += layout.local_numel(weight) * layout.shards(weight)
    root = units.pop(-1)
    blocks = sorted(units.values(), reverse=True)
    at_a_time = sum(blocks[:2] if config.dist.reshard_after_forward else blocks)
    size = gather_bytes(config, model.device)
    during = size * (root + at_a_time) + (size + FP32_BYTES) * blocks[0]
    return during, max(during, size * root + (size + FP32_BYTES) * root)


def _exchange(model: Model) -> int:
    """Bytes of Muon's step: the updates of what a rank holds, and of each round what it assembles.

    A round is at most `bucket_bytes`, or one matrix. Rounds that are on their way are received and sent, the one at
    work is there as stack, iterate and result.
    """
    config, layout = model.config, model.layout
    under_muon = [w for w in model.weights if w.rule == "muon"]
    if not isinstance(config.optim, MuonConfig) or not under_muon:
        return 0
    size = wire_bytes(config, model.device)
    mean = size * sum(w.numel for w in under_muon) // layout.num_ranks
    largest = size * max(w.stack[1] * w.stack[2] for w in under_muon)
    assembled = min(max(mean, largest), max(config.optim.exchange.bucket_bytes, largest))
    updates = sum(layout.local_numel(w) for w in under_muon)
    if layout.engine in ("zero1", "zero2"):
        updates = mean // size
    on_way = 2 * (config.optim.exchange.depth + 1) if layout.num_ranks > 1 else 0
    return size * updates + (on_way + 3) * assembled
