"""Which tensors a model has, and what they are called in a directory of safetensors files. Imports no torch.

Names are this package's on both sides, which are those of transformers, but for the routed experts: a stack
`mlp.experts.gate_proj` (E, F, D) here is E matrices `mlp.experts.0.gate_proj.weight` (F, D) there, as on the hub, which
any release of transformers and other engines read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from muonlm.config.model import GPTConfig, MoEConfig
from muonlm.model.flops import block_matrices, has_experts

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelTensor:
    """A parameter or buffer of the model: its name and shape here, and its names on disk.

    Of a stack, dim 0 goes over `disk_names`; any other tensor has one name there. `is_float32` holds for one that
    stays so whatever the dtype of the weights: GLM-4-MoE keeps the correction of the router's choice so. `is_stored`
    is false for the empty matrices that Glm4MoeForCausalLM has where there are no shared experts.
    """

    name: str
    shape: Shape
    disk_names: tuple[str, ...]
    is_stack: bool = False
    is_float32: bool = False
    is_stored: bool = True

    @property
    def disk_shape(self) -> Shape:
        """Shape of each tensor on disk."""
        return self.shape[1:] if self.is_stack else self.shape

    @property
    def disk_numel(self) -> int:
        """Elements of each tensor on disk."""
        return prod(self.disk_shape)


def model_tensors(config: GPTConfig, vocab_size: int) -> Iterator[ModelTensor]:
    """All tensors, in the order of the model. A tied head has none of its own."""
    embedding = (vocab_size, config.hidden_size)
    yield _plain("model.embed_tokens.weight", embedding)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, shape in block_matrices(config, layer).items():
            yield _stack(prefix + name, shape) if len(shape) == 3 else _plain(prefix + name, shape)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            yield _plain(f"{prefix}{name}.weight", (config.resolved_head_dim,))
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield _plain(f"{prefix}{name}.weight", (config.hidden_size,))
        if isinstance(config, MoEConfig) and has_experts(config, layer) and config.router == "sigmoid":
            yield from _sigmoid_extras(config, prefix)
    yield _plain("model.norm.weight", (config.hidden_size,))
    if not config.tie_embeddings:
        yield _plain("lm_head.weight", embedding)


def _sigmoid_extras(config: MoEConfig, prefix: str) -> Iterator[ModelTensor]:
    name = f"{prefix}mlp.gate.e_score_correction_bias"
    yield ModelTensor(name, (config.num_experts,), (name,), is_float32=True)
    if not config.num_shared_experts:
        for part in ("gate_proj", "up_proj", "down_proj"):
            shape = (config.hidden_size, 0) if part == "down_proj" else (0, config.hidden_size)
            name = f"{prefix}mlp.shared_experts.{part}.weight"
            yield ModelTensor(name, shape, (name,), is_stored=False)


def _plain(name: str, shape: Shape) -> ModelTensor:
    return ModelTensor(name, shape, (name,))


def _stack(name: str, shape: Shape) -> ModelTensor:
    path, part = name.rsplit(".", 1)
    return ModelTensor(name, shape, tuple(f"{path}.{expert}.{part}.weight" for expert in range(shape[0])), True)
