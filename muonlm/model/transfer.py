"""Initial values that let learning rates transfer over width. Imports no torch."""

from __future__ import annotations

from muonlm.config.model import GPTConfig


def std_factor(config: GPTConfig, name: str) -> float:
    """Factor on the initial standard deviation of the matrix called `name`; 1 where `base_width` is unset.

    With r = hidden_size / base_width: 1 for the embedding, whose input is one token whatever the width; 1/r for head
    and router, whose output has a fixed size; 1/sqrt(r) for every other matrix, which keeps the RMS of its output
    (G. Yang et al., arXiv:2203.03466, table 3).
    """
    if name.endswith("embed_tokens.weight"):
        return 1.0
    if name.endswith(("lm_head.weight", "mlp.gate.weight")):
        return 1 / config.width_ratio
    return config.width_ratio**-0.5
