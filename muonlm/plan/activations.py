"""Bytes of a rank that are kept from forward to backward pass, by what keeps them. Imports no torch.

Symbols: N tokens of a micro-batch; D hidden, C head width; H, K query and key heads, and F hidden width of a
feed-forward layer, as one tensor-parallel rank has them; E experts, k of them for a token; V vocabulary; a bytes of an
element in the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from muonlm.config.schema import MoEConfig, TrainConfig
from muonlm.model.flops import has_experts, loss_chunk_rows
from muonlm.plan.parameters import FP32_BYTES, Layout, Weight, compute_bytes, gather_bytes

ROW_BLOCK = 64  # of muonlm.model.attention, which imports torch; a test holds the two equal


@dataclass(frozen=True)
class BlockBytes:
    """What one block keeps for a micro-batch: everything, and of that its input and its products."""

    everything: int
    input: int
    products: int


def activations(
    config: TrainConfig, weights: list[Weight], layout: Layout, micro_batch: int, vocab_size: int, device: str
) -> dict[str, int]:
    """Bytes by kind at the end of a forward pass over `micro_batch` sequences.

    blocks: what autograd keeps of the blocks. Without checkpointing all of it; with "full" the input of each, and all
    of the one that is computed anew; with "selective" the input and the products and attention outputs of each.
    weight_copies: weights in the compute dtype, where they are gathered or kept in a wider one; otherwise, without
    checkpointing, the joint projection of queries, keys and values, which autograd keeps. head: the gradients of head
    and final norm's output, which the loss computes at once. logits: what one chunk of rows needs for that.
    """
    kind = config.loop.activation_checkpointing
    found = [block_bytes(config, layout, layer, micro_batch, device) for layer in range(config.model.num_layers)]
    if kind == "none":
        blocks = sum(block.everything for block in found)
    else:
        kept = sum(block.input + (block.products if kind == "selective" else 0) for block in found)
        blocks = kept + max(block.everything for block in found)
    head, logits = _head(config, layout, micro_batch, vocab_size, device)
    copies = _weight_copies(config, weights, layout, device)
    return {"blocks": blocks, "weight_copies": copies, "head": head, "logits": logits}


def block_bytes(config: TrainConfig, layout: Layout, layer: int, micro_batch: int, device: str) -> BlockBytes:
    """Bytes of block `layer`.

    For a token: the fp32 residual stream twice with its statistics, 2 (4D + 4), and the normed inputs 2aD; the joint
    projection aC(H + 2K), 4(H + K) of statistics, rotated queries and keys aC(H + K), attention output aCH; and for
    attention the probabilities, aH times the mean number of keys (rows in blocks), or, with
    scaled_dot_product_attention, 8C(H + K) of fp32 norm and rotation inputs and 4H of log-sum-exp. Then the
    feed-forward layer.
    """
    model, tensor, a = config.model, layout.grid.tensor, compute_bytes(config, device)
    D, C, H, K = (
        model.hidden_size,
        model.resolved_head_dim,
        model.num_heads // tensor,
        model.resolved_kv_heads // tensor,
    )
    seq_len = config.data.seq_len
    tokens = micro_batch * seq_len
    attention = 2 * (4 * D + 4) + 2 * a * D + a * C * (H + 2 * K) + 4 * (H + K) + a * C * (H + K) + a * C * H
    products = a * C * (H + 2 * K) + a * C * H + a * D
    kind = _attention(config, device)
    if kind == "matmul":
        scores = micro_batch * a * H * _probability_columns(seq_len)
    else:
        attention += 8 * C * (H + K) + 4 * H
        scores = micro_batch * H * seq_len**2 * 8 if kind == "math" else 0
    kept, multiplied = _feed_forward(config, layer, layout, a, device)
    everything = tokens * (attention + kept) + scores
    return BlockBytes(everything, tokens * 4 * D, tokens * (products + multiplied))


def _feed_forward(config: TrainConfig, layer: int, layout: Layout, a: int, device: str) -> tuple[int, int]:
    """Bytes of a token kept by the feed-forward layer, and those of its products.

    Gate, up, activation and product 4aF, or without gate input and activation 2aF. Routed experts keep, for each of a
    token's k, its row aD, routing weight and places 20 (with expert parallelism 36), and gate and up 2aF on a CPU,
    where the rest is computed anew; on a GPU activation, product and weighted product too. The router keeps its input
    4D where a is 2, and scores 4E.
    """
    model, tensor = config.model, layout.grid.tensor
    parts = 2 if model.gated else 1
    if not (isinstance(model, MoEConfig) and has_experts(model, layer)):
        inner = model.intermediate_size // tensor
        return 2 * parts * a * inner, parts * a * inner + a * model.hidden_size
    k, D = model.experts_per_token, model.hidden_size
    routed, shared = a * k * model.expert_size // tensor, a * model.shared_size // tensor
    kept = routed * (parts if device == "cpu" else 2 * parts + 1) + 2 * parts * shared
    kept += k * (a * D + (36 if layout.grid.expert > 1 else 20))
    kept += 4 * model.num_experts
    if a < FP32_BYTES:  # the router's input, and where only it and the experts' rows are kept, not that of both
        kept += 4 * D - (0 if model.num_shared_experts else a * D)
    outputs = (k + (model.num_shared_experts > 0)) * a * D
    return kept, parts * (routed + shared) + outputs + 4 * model.num_experts


def token_buffer_bytes(config: TrainConfig, layout: Layout, micro_batch: int, device: str) -> int:
    """Bytes of a layer's rows for experts that are there for a moment: results as they come and sorted back, 2NkaD.

    Where they travel to other ranks, those to be sent and those received as well, loads being even.
    """
    if not isinstance(config.model, MoEConfig):
        return 0
    rows = micro_batch * config.data.seq_len * config.model.experts_per_token
    return (4 if layout.grid.expert > 1 else 2) * rows * config.model.hidden_size * compute_bytes(config, device)


def _head(config: TrainConfig, layout: Layout, micro_batch: int, vocab_size: int, device: str) -> tuple[int, int]:
    """Bytes that the head keeps, and those of a chunk of logits.

    Kept: 4D + 4 of a token for the final norm's input, aD for the gradient of its output, 8 for its id; 4VD for the
    gradient of the head. For a chunk's rows: logits, their fp32 copy, probabilities and gradients, (8 + 2a) V, or 8V
    where a is 4, or where a compiler fuses what lies between 2aV; and the head's copy aVD, where it is kept in a wider
    dtype.
    """
    D, a = config.model.hidden_size, compute_bytes(config, device)
    tokens = micro_batch * config.data.seq_len
    kept = tokens * (4 * D + 4 + a * D + 8) + FP32_BYTES * vocab_size * D
    rows = min(tokens, loss_chunk_rows(vocab_size, on_gpu=device == "cuda"))
    wide = 0 if a == FP32_BYTES or config.loop.compile else 8
    copy = a * vocab_size * D if a < _stored_bytes(config, layout, device) else 0
    return kept, rows * vocab_size * (wide + 2 * a) + copy


def _weight_copies(config: TrainConfig, weights: list[Weight], layout: Layout, device: str) -> int:
    a, inside = compute_bytes(config, device), [w for w in weights if w.unit >= 0 and w.role in ("hidden", "experts")]
    if a < _stored_bytes(config, layout, device):
        return a * sum(layout.whole_numel(w) for w in inside)
    if config.loop.activation_checkpointing != "none":
        return 0
    joint = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    return a * sum(layout.whole_numel(w) for w in inside if w.name.endswith(joint))


def _stored_bytes(config: TrainConfig, layout: Layout, device: str) -> int:
    """Bytes of an element of the weights that a forward pass is given."""
    return gather_bytes(config, device) if layout.engine == "fsdp" else FP32_BYTES


def _attention(config: TrainConfig, device: str) -> str:
    kind = config.model.attention
    return kind if kind != "auto" else "sdpa" if device == "cuda" else "matmul"


def _probability_columns(seq_len: int) -> int:
    """Stored scores of one head and sequence: each block of rows has the keys up to its end."""
    ends = [min(start + ROW_BLOCK, seq_len) for start in range(0, seq_len, ROW_BLOCK)]
    return sum((end - start) * end for start, end in zip(range(0, seq_len, ROW_BLOCK), ends))
