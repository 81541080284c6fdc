"""Parameters and FLOPs of a model from its configuration alone. Imports no torch."""

from __future__ import annotations

from math import prod

from muonlm.config.schema import GPTConfig, MoEConfig

Shape = tuple[int, ...]


def has_experts(config: GPTConfig, layer: int) -> bool:
    """Whether the feed-forward layer of block `layer` is a mixture of experts."""
    return isinstance(config, MoEConfig) and layer >= config.num_dense_layers


def block_matrices(config: GPTConfig, layer: int) -> dict[str, Shape]:
    """Shapes (out, in), of expert stacks (E, out, in), by parameter name within block `layer`; norms are left out."""
    size = config.hidden_size
    query, key = config.num_heads * config.resolved_head_dim, config.resolved_kv_heads * config.resolved_head_dim
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (query, size),
        "self_attn.k_proj.weight": (key, size),
        "self_attn.v_proj.weight": (key, size),
        "self_attn.o_proj.weight": (size, query),
    }
    if not (isinstance(config, MoEConfig) and has_experts(config, layer)):
        return shapes | _feed_forward(config, "mlp.{}.weight", (), config.intermediate_size)
    shapes["mlp.gate.weight"] = (config.num_experts, size)
    shapes |= _feed_forward(config, "mlp.experts.{}", (config.num_experts,), config.expert_size)
    if config.num_shared_experts:
        shapes |= _feed_forward(config, "mlp.shared_experts.{}.weight", (), config.shared_size)
    return shapes


def _feed_forward(config: GPTConfig, name: str, stack: Shape, inner: int) -> dict[str, Shape]:
    names = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
    rows = {name.format(part): (*stack, inner, config.hidden_size) for part in names}
    return rows | {name.format("down_proj"): (*stack, config.hidden_size, inner)}


def is_router(name: str) -> bool:
    """Whether a name of `block_matrices` is that of the router's weight."""
    return name == "mlp.gate.weight"


def count_parameters(config: GPTConfig, vocab_size: int) -> dict[str, int]:
    """Numbers of parameters by kind.

    embedding, head (0 when tied), hidden (matrices of the blocks), experts (routed ones), router, norm, total, and
    active: those that a token meets, of the routed experts only its own.
    """
    counts = {
        "embedding": vocab_size * config.hidden_size,
        "head": 0 if config.tie_embeddings else vocab_size * config.hidden_size,
        "hidden": 0,
        "experts": 0,
        "router": 0,
        "norm": config.num_layers * 2 * (config.hidden_size + config.resolved_head_dim) + config.hidden_size,
    }
    for layer in range(config.num_layers):
        for name, shape in block_matrices(config, layer).items():
            kind = "experts" if len(shape) == 3 else "router" if is_router(name) else "hidden"
            counts[kind] += prod(shape)
    total = sum(counts.values())
    return counts | {"total": total, "active": total - counts["experts"] + _active_experts(config, counts["experts"])}


def _active_experts(config: GPTConfig, experts: int) -> int:
    return experts // config.num_experts * config.experts_per_token if isinstance(config, MoEConfig) else 0


def flops_per_token(config: GPTConfig, vocab_size: int, seq_len: int) -> int:
    """Training FLOPs of one token: all matrix products of forward and backward, 2*M*N*K each.

    6 * (weights of the blocks that a token meets + head weights) + 12 * num_layers * num_heads * head_dim * seq_len, as
    in PaLM (arXiv:2204.02311, appendix B). The attention term counts the full square: an implementation that skips keys
    after the query does about half of it. Lookups, norms, rotations and softmax are not counted.
    """
    counts = count_parameters(config, vocab_size)
    weights = counts["hidden"] + counts["router"] + _active_experts(config, counts["experts"])
    attention = config.num_layers * config.num_heads * config.resolved_head_dim * seq_len
    return 6 * (weights + vocab_size * config.hidden_size) + 12 * attention


def loss_chunk_rows(vocab_size: int, *, on_gpu: bool) -> int:
    """Positions whose logits exist at one time: on a GPU as many as make 2**28 logits, a multiple of 256.

    Each chunk adds to the gradient of the head, which takes as long as some hundred rows of it.
    """
    return max(2**28 // vocab_size // 256 * 256, 512) if on_gpu else 512
