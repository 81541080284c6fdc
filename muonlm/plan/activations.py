"""Bytes of a rank for forward and backward pass, by what keeps them. Imports no torch.

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
class Activations:
    """Bytes by kind, for one micro-batch.

    Fields:
        blocks: what autograd keeps of the blocks from forward to backward pass. Without checkpointing everything, with
            "full" the input of each, with "selective" its products and attention output too.
        weight_copies: weights of the blocks in the compute dtype, where they are gathered or kept in a wider one;
            otherwise the joint projection of queries, keys and values, which is a copy.
        head: gradients of the head and of its input, which the loss computes at once, and the final norm's input.
        logits: what the loss needs for a chunk of rows, and its input.
        block: everything of the block that has most, and copies of its weights.
        temporaries: of the backward pass through a block, or through the head.
        is_recomputed: the backward pass begins by computing a block anew.
    """

    blocks: int
    weight_copies: int
    head: int
    logits: int
    block: int
    temporaries: int
    is_recomputed: bool


def activations(
    config: TrainConfig, weights: list[Weight], layout: Layout, micro_batch: int, vocab_size: int, device: str
) -> Activations:
    """Of a rank, for micro-batches of `micro_batch` sequences on a "cuda" or "cpu" `device`."""
    kind, tokens = config.loop.activation_checkpointing, micro_batch * config.data.seq_len
    found = [block_bytes(config, layout, layer, micro_batch, device) for layer in range(config.model.num_layers)]
    if kind == "none":
        blocks = sum(block.everything for block in found)
    else:
        blocks = sum(block.input + (block.products if kind == "selective" else 0) for block in found)
    head, logits = _head(config, layout, micro_batch, vocab_size, device)
    again = FP32_BYTES * vocab_size * config.model.hidden_size
    again += tokens * compute_bytes(config, device) * config.model.hidden_size
    return Activations(
        blocks=blocks,
        weight_copies=_weight_copies(config, weights, layout, device),
        head=head,
        logits=logits,
        block=max(block.everything for block in found) + _block_copies(config, weights, layout, device),
        temporaries=max(again, max(_temporaries(config, layout, layer, tokens, device) for layer in range(len(found)))),
        is_recomputed=kind != "none",
    )


@dataclass(frozen=True)
class BlockBytes:
    """What one block keeps for a micro-batch: everything, and of that its input and its products."""

    everything: int
    input: int
    products: int


def block_bytes(config: TrainConfig, layout: Layout, layer: int, micro_batch: int, device: str) -> BlockBytes:
    """Bytes of block `layer`.

    For a token: the fp32 residual stream twice with its statistics, 2 (4D + 4), and the normed inputs 2aD; the joint
    projection aC(H + 2K), 4(H + K) of statistics, rotated queries and keys aC(H + K), attention output aCH; and for
    attention the probabilities, aH times the mean number of keys (rows in blocks), or, with
    scaled_dot_product_attention, 4H of log-sum-exp and 8C(H + K) of fp32 norm and rotation inputs; on a GPU, where a is
    2, of these 4C(H + K), and a copy of its output aCH, to be joined over heads. torch.compile computes both anew, and
    with "selective" does not keep the output. Then the feed-forward layer.
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
    products = a * C * (H + 2 * K) + a * D + (0 if _is_fused(config, device) else a * C * H)
    kind = _attention(config, device)
    scores = 0
    if kind == "matmul":
        scores = micro_batch * a * H * _probability_columns(seq_len)
    else:
        attention += 4 * H
        if device == "cpu" or kind == "math":
            attention += 8 * C * (H + K)
        elif a < FP32_BYTES and not _is_fused(config, device):
            attention += 4 * C * (H + K) + a * C * H
        if kind == "math":
            scores = micro_batch * H * seq_len**2 * 8
    kept, multiplied = _feed_forward(config, layer, layout, a, device)
    everything = tokens * (attention + kept) + scores
    return BlockBytes(everything, tokens * 4 * D, tokens * (products + multiplied))


def _feed_forward(config: TrainConfig, layer: int, layout: Layout, a: int, device: str) -> tuple[int, int]:
    """Bytes of a token kept by the feed-forward layer, and those of its products.

    Gate, up, activation and product 4aF, or without gate input and activation 2aF. Routed experts keep, for each of a
    token's k, its row aD, routing weight and places 20 (with expert parallelism 36), and gate and up 2aF on a CPU,
    where the rest is computed anew; on a GPU activation, product and weighted product too. The router keeps its input
    4D where a is 2, and scores 4E. On a GPU, torch.compile computes activations anew, and all of that of experts.
    """
    model, tensor, fused = config.model, layout.grid.tensor, _is_fused(config, device)
    parts = 2 if model.gated else 1
    # Of an element of the hidden layer: what a dense layer keeps, and what experts keep beyond gate and up.
    dense, more = 2 * parts * a, 0 if device == "cpu" or fused else (parts + 1) * a
    if fused and model.gated:
        dense -= a
    if not (isinstance(model, MoEConfig) and has_experts(model, layer)):
        inner = model.intermediate_size // tensor
        return dense * inner, parts * a * inner + a * model.hidden_size
    k, D = model.experts_per_token, model.hidden_size
    routed, shared = k * model.expert_size // tensor, model.shared_size // tensor
    kept = routed * (parts * a + more) + dense * shared
    kept += k * (a * D + (36 if layout.grid.expert > 1 else 20))
    kept += 4 * model.num_experts
    if a < FP32_BYTES:  # the router's input, and where only it and the experts' rows are kept, not that of both
        kept += 4 * D - (0 if model.num_shared_experts else a * D)
    outputs = (k + (model.num_shared_experts > 0)) * a * D
    return kept, parts * a * (routed + shared) + outputs + 4 * model.num_experts


def _temporaries(config: TrainConfig, layout: Layout, layer: int, tokens: int, device: str) -> int:
    """Bytes of gradients that are there for a moment in the backward pass through block `layer`, about.

    Those of two hidden layers 2aF of a token. With experts, for each of a token's k, those of its rows and results, as
    they come and sorted, 4aD, and those sent to and received from other ranks 2aD; loads are taken as even.
    """
    model, a, tensor = config.model, compute_bytes(config, device), layout.grid.tensor
    if not (isinstance(model, MoEConfig) and has_experts(model, layer)):
        return tokens * 2 * a * model.intermediate_size // tensor
    rows = (6 if layout.grid.expert > 1 else 4) * model.hidden_size
    inner = 2 * (model.experts_per_token * model.expert_size + model.shared_size) // tensor
    return tokens * a * (model.experts_per_token * rows + inner)


def _head(config: TrainConfig, layout: Layout, micro_batch: int, vocab_size: int, device: str) -> tuple[int, int]:
    """Bytes that the head keeps, and those of a chunk of logits.

    Kept: 4D + 4 of a token for the final norm's input, aD for the gradient of its output, 8 for its id; 4VD for the
    gradient of the head. In the loss its input aD; for a chunk's rows logits and their gradients 2aV, gradients of the
    chunk before aV, and between them, unless a compiler fuses it, an fp32 copy and probabilities 8V, or where a is 4 no
    copy and probabilities that become gradients; a soft-cap needs 4V more, 8V where a is 4. And the head's copy aVD,
    where it is kept in a wider dtype.
    """
    D, a = config.model.hidden_size, compute_bytes(config, device)
    tokens = micro_batch * config.data.seq_len
    kept = tokens * (4 * D + 4 + a * D + 8) + FP32_BYTES * vocab_size * D
    rows = loss_chunk_rows(vocab_size, on_gpu=device == "cuda")
    logit = (3 if tokens > rows else 2) * a
    if not config.loop.compile:
        logit += 0 if a == FP32_BYTES else 8
        logit += 0 if config.model.logit_softcap is None else 4 * (a // 2)
    copy = a * vocab_size * D if a < _stored_bytes(config, layout, device) else 0
    return kept, min(tokens, rows) * vocab_size * logit + tokens * a * D + copy


def _weight_copies(config: TrainConfig, weights: list[Weight], layout: Layout, device: str) -> int:
    """With checkpointing, those that autocast keeps for the whole pass: of parameters that are single matrices."""
    a, is_kept = compute_bytes(config, device), config.loop.activation_checkpointing == "none"
    if not is_kept and _is_fused(config, device):
        return 0
    joint, rest = 0, 0
    for w in weights:
        if w.unit >= 0 and w.role in ("hidden", "experts"):
            if w.name.endswith(_JOINT):
                joint += layout.whole_numel(w)
            elif is_kept or w.role == "hidden":
                rest += layout.whole_numel(w)
    return a * ((joint if is_kept else 0) + (rest if a < _stored_bytes(config, layout, device) else 0))


_JOINT = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def _block_copies(config: TrainConfig, weights: list[Weight], layout: Layout, device: str) -> int:
    a, blocks = compute_bytes(config, device), [0] * config.model.num_layers
    for w in weights:
        if w.unit >= 0 and w.role in ("hidden", "experts"):
            blocks[w.unit] += layout.whole_numel(w)
    return a * max(blocks) if a < _stored_bytes(config, layout, device) else 0


def _is_fused(config: TrainConfig, device: str) -> bool:
    return config.loop.compile and device == "cuda"


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
