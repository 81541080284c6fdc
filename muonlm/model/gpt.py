"""Dense decoder with the parameter names and the mathematics of transformers' Qwen3ForCausalLM.

Pre-norm blocks of grouped-query attention (RMSNorm of each query and key head, rotary positions) and SwiGLU,
no biases. Where `muonlm.model.parallel` has cut the projections over a group of ranks, each rank computes its heads and
its part of the SwiGLU layer. Shape suffixes: B batch, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import GPTConfig
from muonlm.dist.collectives import Group
from muonlm.model.attention import Heads, attention_matmul, attention_sdpa
from muonlm.model.layers import Embedding, Linear, RMSNorm, swiglu
from muonlm.model.loss import linear_cross_entropy
from muonlm.model.regions import enter, leave, local


class Attention(nn.Module):
    """Causal self-attention. `heads` are those of this rank, `group` the ranks that have the others."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.resolved_head_dim
        self.kind = config.attention
        self.heads = Heads(config.num_heads, config.resolved_kv_heads, head_dim, config.rope_theta, config.rms_norm_eps)
        self.group: Group = None
        self.q_proj = Linear(size, config.num_heads * head_dim, bias=False)
        self.k_proj = Linear(size, config.resolved_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(size, config.resolved_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(config.num_heads * head_dim, size, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        # one product for the three projections: fewer kernels, and one gradient of x rather than a sum of three
        weights = [local(projection.weight) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        qkv = F.linear(enter(x_BTD, self.group), torch.cat(weights))
        use_matmul = self.kind == "matmul" or (self.kind == "auto" and x_BTD.device.type == "cpu")
        attention = attention_matmul if use_matmul else attention_sdpa
        return leave(self.o_proj(attention(qkv, *self._norm_weights(), self.heads)), self.group)

    def _norm_weights(self) -> tuple[Tensor, Tensor]:
        """Of queries and keys; all heads share them, so that each rank has a part of their gradients."""
        q_weight, k_weight = local(self.q_norm.weight), local(self.k_norm.weight)
        if self.group is None:
            return q_weight, k_weight
        q_weight, k_weight = enter(torch.stack((q_weight, k_weight)), self.group).unbind()
        return q_weight, k_weight


class MLP(nn.Module):
    """SwiGLU feed-forward; the ranks of `group` have the other columns of its hidden layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.group: Group = None
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x_BTD = enter(x_BTD, self.group)
        return leave(self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD))), self.group)


class Block(nn.Module):
    """One decoder block on an fp32 residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D) in the dtype of the input."""
        # explicit casts: an addition of two dtypes is not vectorised on a CPU
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD)).to(x_BTD.dtype)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)).to(x_BTD.dtype)


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, D)."""
        x_BTD = self.embed_tokens(input_ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        out: Tensor = self.norm(x_BTD)
        return out


class GPT(nn.Module):
    """Language model. `muonlm.model.build.build_model` makes an initialised one."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.model = Decoder(config, vocab_size)
        self.lm_head = Linear(config.hidden_size, vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's parameter, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return self.model.layers

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The output head."""
        return self.lm_head

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Logits, or the loss where labels are given.

        Args:
            input_ids_BT: int64 token ids.
            labels_BT: int64; `labels_BT[b, t]` is the token that follows `input_ids_BT[b, t]` (already shifted).

        Returns:
            Without labels, logits (B, T, V) in the compute dtype; with labels, the mean cross-entropy over all
            positions in nats, an fp32 scalar.
        """
        x_BTD = self.model(input_ids_BT)
        if labels_BT is None:
            logits: Tensor = self.lm_head(x_BTD)
            return logits
        return linear_cross_entropy(x_BTD.flatten(0, 1), local(self.lm_head.weight), labels_BT.flatten())
