"""Parameters and FLOPs of a model from its configuration alone. Imports no torch."""

from __future__ import annotations

from muonlm.config.schema import GPTConfig


def hidden_matrices(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of the matrices of one block, by name within the block."""
    size, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.resolved_head_dim, config.resolved_kv_heads * config.resolved_head_dim
    return {
        "self_attn.q_proj": (query, size),
        "self_attn.k_proj": (key, size),
        "self_attn.v_proj": (key, size),
        "self_attn.o_proj": (size, query),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }


def count_parameters(config: GPTConfig, vocab_size: int) -> dict[str, int]:
    """Numbers of parameters: embedding, head (0 when tied), hidden (matrices of the blocks), norm, total."""
    counts = {
        "embedding": vocab_size * config.hidden_size,
        "head": 0 if config.tie_embeddings else vocab_size * config.hidden_size,
        "hidden": config.num_layers * sum(m * n for m, n in hidden_matrices(config).values()),
        "norm": config.num_layers * 2 * (config.hidden_size + config.resolved_head_dim) + config.hidden_size,
    }
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: GPTConfig, vocab_size: int, seq_len: int) -> int:
    """Training FLOPs of one token: all matrix products of forward and backward, 2*M*N*K each.

    6 * (hidden + head weights) + 12 * num_layers * num_heads * head_dim * seq_len, as in PaLM (arXiv:2204.02311,
    appendix B). The attention term counts the full square: an implementation that skips keys after the query does
    about half of it. Lookups, norms, rotations and softmax are not counted.
    """
    weights = count_parameters(config, vocab_size)["hidden"] + vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.resolved_head_dim * seq_len
    return 6 * weights + 12 * attention
