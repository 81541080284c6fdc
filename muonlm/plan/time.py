"""FLOPs of a step, and a prediction of its time from data sheets and stated shares of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from muonlm.config.schema import MoEConfig, TrainConfig
from muonlm.model.flops import count_parameters, flops_per_token
from muonlm.plan.hardware import Machines
from muonlm.plan.memory import Memory, Model
from muonlm.plan.owners import Owners
from muonlm.plan.traffic import Transfer


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of an optimizer step, all ranks together.

    Fields:
        model: forward and backward pass (`muonlm.model.flops.flops_per_token`).
        recomputed: forward passes of blocks that activation checkpointing repeats.
        newton_schulz: orthogonalization, what sharing matrices adds included.
    """

    model: float
    recomputed: float
    newton_schulz: float


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a step; they add up to `total`.

    Fields:
        compute: products of the model, recomputed ones included.
        exposed: what data parallelism sends beyond what hides behind computation.
        tensor: what tensor and expert parallelism send, which nothing hides.
        elementwise: the optimizer's passes over memory, and ZeRO's all_gather of parameters.
        newton_schulz: of the rank with most.
        exchange: Muon's, beyond what hides behind its products.
        mfu: model FLOPs over what the devices could do in that time.
    """

    compute: float
    exposed: float
    tensor: float
    elementwise: float
    newton_schulz: float
    exchange: float
    mfu: float

    @property
    def rows(self) -> dict[str, float]:
        """Seconds by name."""
        return {
            "products of the model": self.compute,
            "gathers and reductions that nothing hides": self.exposed,
            "tensor and expert parallelism": self.tensor,
            "optimizer, elementwise": self.elementwise,
            "Newton-Schulz": self.newton_schulz,
            "Muon's exchange": self.exchange,
        }

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.rows.values())

    @property
    def muon_share(self) -> float:
        """Share of Newton-Schulz and exchange in a step."""
        return (self.newton_schulz + self.exchange) / self.total


def step_flops(model: Model, owners: Owners) -> StepFlops:
    """FLOPs of a step. "selective" keeps all products, so that it recomputes none of them."""
    config = model.config
    per_token = flops_per_token(config.model, model.vocab_size, config.data.seq_len)
    forward = _block_flops(config) if config.loop.activation_checkpointing == "full" else 0
    return StepFlops(
        model=float(config.batch_tokens * per_token),
        recomputed=float(config.batch_tokens * forward),
        newton_schulz=owners.flops_mean * model.layout.num_ranks,
    )


def _block_flops(config: TrainConfig) -> int:
    """Forward FLOPs of a token in the blocks: 2 a weight that it meets, and 4 num_layers num_heads head_dim seq_len."""
    counts = count_parameters(config.model, 1)
    weights = counts["hidden"] + counts["router"]
    if isinstance(config.model, MoEConfig):
        weights += counts["experts"] // config.model.num_experts * config.model.experts_per_token
    heads = config.model.num_layers * config.model.num_heads * config.model.resolved_head_dim
    return 2 * weights + 4 * heads * config.data.seq_len


def step_time(
    model: Model, memory: Memory, owners: Owners, flops: StepFlops, sent: list[Transfer], machines: Machines
) -> StepTime:
    """Predict. FSDP2's, DDP's and ZeRO's reductions hide behind `overlap_share` of the computation, the rest does not.

    Muon's rounds overlap with each other: of several, the longer of exchange and Newton-Schulz counts, and of the
    other one round.
    """
    ranks, device = model.layout.num_ranks, machines.device
    rate = device.peak_flops * machines.matmul_share
    compute = (flops.model + flops.recomputed) / ranks / rate
    hidden = sum(_seconds(t, machines) for t in sent if t.is_hidden)
    gathers = sum(_seconds(t, machines) for t in sent if not t.is_hidden and not t.is_muons and t.phase == "optimizer")
    tensor = sum(_seconds(t, machines) for t in sent if not t.is_hidden and not t.is_muons and t.phase != "optimizer")
    products = owners.flops_max / (device.peak_flops * machines.newton_schulz_share)
    exchange = sum(_seconds(t, machines) for t in sent if t.is_muons)
    rounds = max(1, owners.num_rounds)
    exchange -= min(exchange, products) * (1 - 1 / rounds)
    # Parameters and state are read and written, gradients read.
    passes = 2 * (memory.weights + memory.optimizer_state) + memory.gradients
    if model.layout.engine in ("zero1", "zero2"):
        passes = 2 * (memory.gradients + memory.optimizer_state) + memory.gradients
    time = StepTime(
        compute=compute,
        exposed=max(0.0, hidden - machines.overlap_share * compute),
        tensor=tensor,
        elementwise=passes / (device.memory_bandwidth * machines.link_share) + gathers,
        newton_schulz=products,
        exchange=exchange,
        mfu=0.0,
    )
    return replace(time, mfu=flops.model / (ranks * device.peak_flops * time.total))


def _seconds(transfer: Transfer, machines: Machines) -> float:
    """Time on the slower kind of link. Every rank of a node has its own way to the network, and all are used alike."""
    between = transfer.between_nodes(machines.per_node)
    inside = (transfer.num_bytes - between) / machines.device.node_bandwidth
    return max(between / machines.network_bandwidth, inside) / machines.link_share
