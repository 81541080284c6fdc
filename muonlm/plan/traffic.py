"""What a rank sends in an optimizer step, collective by collective, and over which links. Imports no torch.

Bytes are those that one rank sends to others, by ring algorithms: (n - 1) times its part in an all_gather over n ranks,
(n - 1) / n of its input in a reduce_scatter, twice that in an all_reduce (R. Thakur et al., "Optimization of collective
communication operations in MPICH", 2005). Not listed: what ranks agree on in a step, some hundred bytes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

from muonlm.config.schema import MoEConfig
from muonlm.model.flops import has_experts
from muonlm.plan.memory import Model
from muonlm.plan.owners import Owners
from muonlm.plan.parameters import FP32_BYTES, Weight, compute_bytes, gather_bytes

Phase = Literal["forward", "backward", "optimizer"]
# Of DistributedDataParallel: gradients travel in buckets of at most 25 MiB, the first of at most 1 MiB.
DDP_BUCKET_BYTES, DDP_FIRST_BUCKET_BYTES = 25 * 2**20, 2**20


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in an optimizer step.

    Fields:
        phase: when; what: for what.
        collective: its kind.
        calls: how many a rank takes part in.
        num_bytes: that a rank sends in all of them.
        size, stride: ranks of a group, and how far apart they are in the numbering of ranks.
        is_hidden: it can run while the rank computes.
        is_muons: only Muon needs it, AdamW does not.
    """

    phase: Phase
    what: str
    collective: str
    calls: int
    num_bytes: float
    size: int
    stride: int
    is_hidden: bool = False
    is_muons: bool = False

    def between_nodes(self, per_node: int) -> float:
        """Bytes of `num_bytes` that leave the node, on average over the ranks; ranks fill nodes of `per_node`.

        In a ring, one rank of each node sends to another node; in an all_to_all each rank sends everyone alike.
        """
        near = min(self.size, max(1, per_node // self.stride))
        if near == self.size:
            return 0.0
        if self.collective == "all_to_all":
            return self.num_bytes * (self.size - near) / (self.size - 1)
        return self.num_bytes / near


def transfers(model: Model, owners: Owners, micro_batch: int) -> list[Transfer]:
    """Everything that a rank sends in a step."""
    micro_steps = max(1, model.rank_batch // micro_batch)
    found = [
        *_data_parallel(model, micro_steps),
        *_tensor_parallel(model, micro_batch, micro_steps),
        *_expert_parallel(model, micro_batch, micro_steps),
        *_muon(model, owners),
    ]
    return [transfer for transfer in found if transfer.size > 1 and transfer.calls]


def _data_parallel(model: Model, micro_steps: int) -> list[Transfer]:
    layout = model.layout
    ranks = layout.num_ranks
    if layout.engine == "ddp":
        size = FP32_BYTES * sum(layout.local_numel(w) for w in model.weights)
        sent = 2 * (ranks - 1) / ranks * size
        return [Transfer("backward", "gradients", "all_reduce", _num_ddp_buckets(model), sent, ranks, 1, True)]
    if layout.engine in ("zero1", "zero2"):
        calls = len(model.slots)
        times = micro_steps if layout.engine == "zero2" else 1
        sent = (ranks - 1) * FP32_BYTES * sum(model.slots)
        return [
            Transfer("backward", "gradients", "reduce_scatter", times * calls, times * sent, ranks, 1, True),
            Transfer("optimizer", "parameters", "all_gather", calls, sent, ranks, 1),
        ]
    return _fsdp(model, micro_steps) if layout.engine == "fsdp" else []


def _fsdp(model: Model, micro_steps: int) -> list[Transfer]:
    """A unit for each block, one for its experts where these are cut over fewer ranks, and one for the rest.

    Blocks are gathered in forward and backward pass, the rest once. Gradients are reduced in fp32, and after the last
    micro-batch summed over replicas.
    """
    layout, grid = model.layout, model.layout.grid
    units: dict[tuple[int, bool], list[Weight]] = defaultdict(list)
    for weight in model.weights:
        units[weight.unit, weight.role == "experts" and grid.expert > 1].append(weight)
    size = gather_bytes(model.config, model.device)
    again = model.config.dist.reshard_after_forward
    found = []
    for (unit, is_experts), members in units.items():
        ranks = layout.shards(members[0]) if is_experts else grid.shard
        stride = grid.tensor * (grid.expert if is_experts else 1)
        local = sum(layout.local_numel(w) for w in members)
        of_what = " of experts" if is_experts else ""
        gather = Transfer(
            phase="forward",
            what=f"parameters{of_what}",
            collective="all_gather",
            calls=micro_steps,
            num_bytes=micro_steps * (ranks - 1) * size * local,
            size=ranks,
            stride=stride,
            is_hidden=True,
        )
        found += [gather, replace(gather, phase="backward")] if unit >= 0 and again else [gather]
        reduction = replace(
            gather,
            phase="backward",
            what=f"gradients{of_what}",
            collective="reduce_scatter",
            num_bytes=micro_steps * (ranks - 1) * FP32_BYTES * local,
        )
        among_replicas = replace(
            reduction,
            collective="all_reduce",
            calls=1,
            num_bytes=2 * (grid.replicate - 1) / grid.replicate * FP32_BYTES * local,
            size=grid.replicate,
            stride=grid.shard * grid.tensor,
        )
        found += [reduction, among_replicas]
    return _summed(found)


def _tensor_parallel(model: Model, micro_batch: int, micro_steps: int) -> list[Transfer]:
    """One all_reduce of the tokens for attention, feed-forward layer and shared experts, in each pass.

    In the backward pass also those of the gradients of both head norms, and of the routing weights. Computing a block
    anew repeats what comes before its last products.
    """
    config, size = model.config, model.layout.grid.tensor
    if size == 1:
        return []
    tokens = micro_batch * config.data.seq_len
    once = tokens * config.model.hidden_size * compute_bytes(config, model.device)
    norms = 2 * config.model.resolved_head_dim * FP32_BYTES
    is_repeated = config.loop.activation_checkpointing != "none"
    forward, backward, calls = 0, 0, [0, 0]
    for layer in range(config.model.num_layers):
        sums, routing = 2, 0
        if isinstance(config.model, MoEConfig) and has_experts(config.model, layer):
            sums += config.model.num_shared_experts > 0
            routing = tokens * config.model.experts_per_token * FP32_BYTES
        again = sums - 1 if is_repeated else 0
        forward += sums * once
        backward += (sums + again) * once + norms + routing
        calls[0] += sums
        calls[1] += sums + again + 1 + (routing > 0)
    wire = micro_steps * 2 * (size - 1) / size
    return [
        Transfer("forward", "tokens", "all_reduce", micro_steps * calls[0], wire * forward, size, 1),
        Transfer("backward", "tokens", "all_reduce", micro_steps * calls[1], wire * backward, size, 1),
    ]


def _expert_parallel(model: Model, micro_batch: int, micro_steps: int) -> list[Transfer]:
    """Counts, tokens and routing weights go to the ranks of the experts, tokens come back; loads are even.

    Then the gradients of all but the counts. Computing a block anew repeats the way out, and, for the shared experts
    that follow, the way back.
    """
    config, grid = model.config, model.layout.grid
    if not isinstance(config.model, MoEConfig) or grid.expert == 1:
        return []
    layers = sum(has_experts(config.model, layer) for layer in range(config.model.num_layers))
    rows = micro_batch * config.data.seq_len * config.model.experts_per_token
    row = config.model.hidden_size * compute_bytes(config, model.device)
    out, back, counts = rows * (row + FP32_BYTES), rows * row, 8 * config.model.num_experts
    again, calls = 0, 0
    if config.loop.activation_checkpointing != "none":
        again, calls = (out + counts, 3) if config.model.num_shared_experts == 0 else (out + counts + back, 4)
    times = micro_steps * layers
    sent = times * (grid.expert - 1) / grid.expert
    forward, backward = sent * (out + back + counts), sent * (out + back + again)
    what, kind = "tokens to experts", "all_to_all"
    return [
        Transfer("forward", what, kind, 4 * times, forward, grid.expert, grid.tensor),
        Transfer("backward", what, kind, (3 + calls) * times, backward, grid.expert, grid.tensor),
    ]


def _muon(model: Model, owners: Owners) -> list[Transfer]:
    ranks = model.layout.num_ranks
    exchange = Transfer(
        phase="optimizer",
        what="updates to owners and back",
        collective=owners.exchange_kind,
        calls=owners.num_exchanges,
        num_bytes=owners.exchange_bytes,
        size=ranks,
        stride=1,
        is_muons=True,
    )
    sharing = replace(
        exchange,
        what="shared matrices",
        collective="all_reduce",
        calls=owners.num_sharings,
        num_bytes=owners.sharing_bytes,
    )
    return [exchange, sharing]


def _num_ddp_buckets(model: Model) -> int:
    """Parameters in the order of their gradients fill buckets until one reaches its limit."""
    count, filled, limit = 0, 0, DDP_FIRST_BUCKET_BYTES
    for weight in reversed(model.weights):
        filled += FP32_BYTES * weight.numel
        if filled >= limit:
            count, filled, limit = count + 1, 0, DDP_BUCKET_BYTES
    return count + (filled > 0)


def _summed(found: list[Transfer]) -> list[Transfer]:
    """Transfers that differ in nothing but calls and bytes made one."""
    totals: dict[tuple[object, ...], Transfer] = {}
    for t in found:
        key = (t.phase, t.what, t.collective, t.size, t.stride)
        if old := totals.get(key):
            t = replace(t, calls=t.calls + old.calls, num_bytes=t.num_bytes + old.num_bytes)
        totals[key] = t
    return list(totals.values())
