"""A model of this package as transformers' Qwen3ForCausalLM; needs the `evaluation` extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from muonlm.config.errors import UserError
from muonlm.config.schema import GPTConfig
from muonlm.model.gpt import GPT

if TYPE_CHECKING:
    from transformers import Qwen3Config, Qwen3ForCausalLM


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("this needs transformers, which is not installed; pip install 'muonlm[evaluation]'") from error
    return transformers


def qwen3_config(config: GPTConfig, vocab_size: int, max_position_embeddings: int = 32768) -> Qwen3Config:
    """The Qwen3 configuration with the same parameters and mathematics.

    Args:
        config: model configuration.
        vocab_size: number of token ids.
        max_position_embeddings: longest context that the exported model claims; changes no number here.

    Raises:
        UserError: transformers is not installed.
    """
    # both spellings of the rotary base: older releases read the keyword, newer ones the table
    return _transformers().Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.resolved_kv_heads,
        head_dim=config.resolved_head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=max_position_embeddings,
        initializer_range=config.init_std,
        hidden_act="silu",
        attention_bias=False,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def to_qwen3(model: GPT, max_position_embeddings: int = 32768) -> Qwen3ForCausalLM:
    """A Qwen3ForCausalLM with a copy of the model's weights, in evaluation mode on the CPU.

    Raises:
        UserError: transformers is not installed.
    """
    config = qwen3_config(model.config, model.vocab_size, max_position_embeddings)
    with torch.random.fork_rng(devices=[]):  # its constructor draws weights that are overwritten here
        exported = _transformers().Qwen3ForCausalLM(config)
    exported.load_state_dict(model.state_dict(), strict=True)
    return exported.eval()
