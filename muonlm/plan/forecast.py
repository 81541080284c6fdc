"""Forecast of a training run: parameters, tokens, FLOPs, memory and communication, from shapes alone.

What the machine decides at start is taken as follows: `loop.precision` and `newton_schulz.dtype` of "auto" as
bfloat16, `model.attention` of "auto" as matmul unless `loop.device` is "cuda". Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muonlm.config.ranks import micro_batch_size, rank_grid
from muonlm.config.schema import GPTConfig, MuonConfig, TrainConfig
from muonlm.model.flops import block_matrices, count_parameters, flops_per_token
from muonlm.optim.pieces import Piece
from muonlm.plan.matrices import muon_matrices

FP32_BYTES = 4
ROW_BLOCK = 64  # of muonlm.model.attention, which imports torch; a test holds the two equal


@dataclass(frozen=True)
class Forecast:
    """What a run needs. Memory and communication are those of one rank.

    Attributes:
        world_size: ranks.
        parameters: counts by kind (`muonlm.model.flops.count_parameters`).
        tokens: training tokens of the whole run.
        steps: optimizer steps.
        micro_steps: forward and backward passes of one rank in an optimizer step.
        model_flops: forward and backward of the whole run, all ranks together.
        newton_schulz_flops: orthogonalization of the whole run, all ranks together; 0 with AdamW.
        memory_bytes: peak by kind: parameters, gradients, optimizer_state, activations.
        communication_bytes: sent by a rank in one step: gradient_all_reduce, update_all_gather.
    """

    world_size: int
    parameters: dict[str, int]
    tokens: int
    steps: int
    micro_steps: int
    model_flops: int
    newton_schulz_flops: int
    memory_bytes: dict[str, int]
    communication_bytes: dict[str, int]

    @property
    def total_memory_bytes(self) -> int:
        """All kinds of memory together."""
        return sum(self.memory_bytes.values())


def forecast(config: TrainConfig, *, world_size: int, vocab_size: int) -> Forecast:
    """Forecast the run that `config` describes on `world_size` ranks.

    Parameters, gradients and optimizer state are fp32 and on every rank (DistributedDataParallel): what `dist.zero` and
    tensor parallelism save, and what they send instead, is not forecast. Communication is
    that of ring algorithms on D ranks: 2 (D-1)/D of the gradients, (D-1)/D of the orthogonalized matrices; padding
    of uneven owners and scalar reductions are left out.

    Raises:
        UserError: the ranks do not divide as `dist` asks, or `loop.batch_size` into ranks and micro-batches.
    """
    num_data_ranks = rank_grid(config, world_size).data
    micro_batch = micro_batch_size(config, num_data_ranks)
    counts = count_parameters(config.model, vocab_size)
    pieces = muon_matrices(config, vocab_size)
    under_muon = sum(piece.rows * piece.cols for piece in pieces)
    tokens = config.num_steps * config.batch_tokens
    gathered_bytes = under_muon * _iterate_bytes(config)
    return Forecast(
        world_size=world_size,
        parameters=counts,
        tokens=tokens,
        steps=config.num_steps,
        micro_steps=config.loop.batch_size // (num_data_ranks * micro_batch),
        model_flops=tokens * flops_per_token(config.model, vocab_size, config.data.seq_len),
        newton_schulz_flops=config.num_steps * newton_schulz_flops(config, pieces),
        memory_bytes={
            "parameters": FP32_BYTES * counts["total"],
            "gradients": FP32_BYTES * counts["total"],
            "optimizer_state": 2 * FP32_BYTES * (counts["total"] - under_muon) + _momentum_bytes(config) * under_muon,
            "activations": activation_bytes(config, micro_batch, vocab_size),
        },
        communication_bytes={
            "gradient_all_reduce": 2 * (world_size - 1) * FP32_BYTES * counts["total"] // world_size,
            "update_all_gather": (world_size - 1) * gathered_bytes // world_size,
        },
    )


def _iterate_bytes(config: TrainConfig) -> int:
    optim = config.optim
    return FP32_BYTES if isinstance(optim, MuonConfig) and optim.newton_schulz.dtype == "float32" else 2


def _momentum_bytes(config: TrainConfig) -> int:
    optim = config.optim
    return 2 if isinstance(optim, MuonConfig) and optim.momentum_dtype == "bfloat16" else FP32_BYTES


def newton_schulz_flops(config: TrainConfig, pieces: Sequence[Piece]) -> int:
    """FLOPs of one optimizer step's orthogonalizations: steps * (4 m^2 n + 2 m^3) a matrix, m its shorter side."""
    if not isinstance(config.optim, MuonConfig):
        return 0
    sides = [sorted((piece.rows, piece.cols)) for piece in pieces]
    return config.optim.newton_schulz.steps * sum(4 * m * m * n + 2 * m**3 for m, n in sides)


def activation_bytes(config: TrainConfig, micro_batch: int, vocab_size: int) -> int:
    """Bytes kept from forward to backward, for `micro_batch` sequences.

    Of each token and block, with a bytes in the compute dtype, D hidden, F SwiGLU width, C head width, H and K
    query and key heads: the fp32 residual stream twice, 2 (4D + 4), the normed inputs 2aD; the joint projection
    aC(H + 2K) with 4(H + K) of statistics, rotated queries and keys aC(H + K), the attention output aCH; gate, up,
    activation and product 4aF; and for attention either the probabilities, aH times the mean number of keys (rows in
    blocks), or with scaled_dot_product_attention 8C(H + K) of fp32 norm and rotation inputs. Further, the input of
    the final norm 4D + 4, the gradient of its output aD, the token id 8, and, once, the gradient of the head and
    the compute-dtype copies of the matrices.
    """
    model, seq_len = config.model, config.data.seq_len
    a = FP32_BYTES if config.loop.precision == "float32" else 2
    D, C, H, K = model.hidden_size, model.resolved_head_dim, model.num_heads, model.resolved_kv_heads
    block = 2 * (4 * D + 4) + 2 * a * D + a * C * (H + 2 * K) + 4 * (H + K) + a * C * (H + K) + a * C * H
    block += 4 * a * model.intermediate_size
    keys = 0 if _uses_sdpa(config) else _probability_columns(seq_len)
    per_sequence = seq_len * (model.num_layers * block + 4 * D + 4 + a * D + 8) + model.num_layers * a * H * keys
    if _uses_sdpa(config):
        per_sequence += seq_len * model.num_layers * 8 * C * (H + K)
    copies = _joint_projection(model) * a if a == FP32_BYTES else count_parameters(model, vocab_size)["hidden"] * a
    return micro_batch * per_sequence + copies + FP32_BYTES * vocab_size * D


def _uses_sdpa(config: TrainConfig) -> bool:
    kind = config.model.attention
    return kind == "sdpa" or (kind == "auto" and config.loop.device == "cuda")


def _probability_columns(seq_len: int) -> int:
    """Stored scores of one head and sequence: each block of rows has the keys up to its end."""
    ends = [min(start + ROW_BLOCK, seq_len) for start in range(0, seq_len, ROW_BLOCK)]
    return sum((end - start) * end for start, end in zip(range(0, seq_len, ROW_BLOCK), ends))


def _joint_projection(model: GPTConfig) -> int:
    """Weights of the three projections that the forward pass concatenates."""
    shapes = block_matrices(model, 0)
    names = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    return model.num_layers * sum(shapes[name][0] * shapes[name][1] for name in names)


def table(plan: Forecast) -> str:
    """The forecast as aligned text, in powers of 1000 with units."""
    share = plan.newton_schulz_flops / plan.model_flops
    rows = [(f"parameters, {kind}", _scaled(value, "")) for kind, value in plan.parameters.items()]
    rows += [
        ("tokens", _scaled(plan.tokens, "")),
        ("optimizer steps", f"{plan.steps:,}"),
        ("passes a step and rank", f"{plan.micro_steps:,}"),
        ("training FLOPs, model", _scaled(plan.model_flops, "FLOP")),
        ("training FLOPs, Newton-Schulz", f"{_scaled(plan.newton_schulz_flops, 'FLOP')} (+{share:.1%})"),
    ]
    rows += [(f"memory a rank, {kind}", _scaled(value, "B")) for kind, value in plan.memory_bytes.items()]
    rows.append(("memory a rank, total", _scaled(plan.total_memory_bytes, "B")))
    rows += [(f"sent a step and rank, {kind}", _scaled(value, "B")) for kind, value in plan.communication_bytes.items()]
    width = max(len(label) for label, _ in rows)
    title = f"forecast for {plan.world_size} rank" + ("s" if plan.world_size > 1 else "")
    return "\n".join([title, *(f"  {label.replace('_', ' '):<{width}}  {value}" for label, value in rows)])


def _scaled(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.4g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.4g} E{unit}"
