"""A model of this package as transformers' Qwen3ForCausalLM; needs the `evaluation` extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from muonlm.bridge.architectures import to_hf_config
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


def qwen3_config(config: GPTConfig, vocab_size: int, max_position_embeddings: int | None = None) -> Qwen3Config:
    """The Qwen3 configuration with the same parameters and mathematics.

    Args:
        config: model configuration.
        vocab_size: number of token ids.
        max_position_embeddings: longest context that the exported model claims, by default that of `config`; changes
            no number here.

    Raises:
        UserError: transformers is not installed, or Qwen3 does not express the model.
    """
    table = to_hf_config(config, vocab_size)
    if table["model_type"] != "qwen3":
        raise UserError(f"a model with experts is no Qwen3 but {table['architectures'][0]}; `muonlm export` writes it")
    return _transformers().Qwen3Config(
        **table | {"max_position_embeddings": max_position_embeddings or config.max_seq_len}
    )


def to_qwen3(model: GPT, max_position_embeddings: int | None = None) -> Qwen3ForCausalLM:
    """A Qwen3ForCausalLM with a copy of the model's weights, in evaluation mode on the CPU.

    Raises:
        UserError: transformers is not installed, or Qwen3 does not express the model.
    """
    config = qwen3_config(model.config, model.vocab_size, max_position_embeddings)
    with torch.random.fork_rng(devices=[]):  # its constructor draws weights that are overwritten here
        exported = _transformers().Qwen3ForCausalLM(config)
    exported.load_state_dict(model.state_dict(), strict=True)
    return exported.eval()
