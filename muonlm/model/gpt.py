"""Decoder with the parameter names and the mathematics of transformers' Qwen3ForCausalLM; with experts, see `moe`.

Pre-norm blocks of grouped-query attention (RMSNorm of each query and key head, rotary positions) and a feed-forward
layer, no biases. Where `muonlm.model.parallel` has cut the projections over a group of ranks, each rank computes its
heads and its part of the feed-forward layer. Shape suffixes: B batch, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import GPTConfig, MoEConfig
from muonlm.dist.collectives import Group
from muonlm.model.attention import Heads, Rope, attention_math, attention_matmul, attention_sdpa
from muonlm.model.flops import has_experts
from muonlm.model.layers import Embedding, Linear, RMSNorm, rope_tables, upcast, use_fused
from muonlm.model.loss import linear_cross_entropy, plain_cross_entropy, soft_cap
from muonlm.model.mlp import MLP
from muonlm.model.moe import MoE
from muonlm.model.recompute import Recompute, recomputed
from muonlm.model.regions import enter, leave, local


class Attention(nn.Module):
    """Causal self-attention. `heads` are those of this rank, `group` the ranks that have the others."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.resolved_head_dim
        self.kind = config.attention
        self.heads = Heads(config.num_heads, config.resolved_kv_heads, head_dim, config.rope_theta, config.rms_norm_eps)
        self.group: Group = None
        self.keep_products = False
        self.q_proj = Linear(size, config.num_heads * head_dim, bias=False)
        self.k_proj = Linear(size, config.resolved_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(size, config.resolved_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(config.num_heads * head_dim, size, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, document_BT: Tensor | None = None, rope: Rope | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); positions attend within their document, where documents are given."""
        # one product for the three projections: fewer kernels, and one gradient of x rather than a sum of three
        weights = [local(projection.weight) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        qkv = F.linear(enter(x_BTD, self.group), torch.cat(weights))
        heads = _implementation(self.kind, x_BTD)(qkv, *self._norm_weights(), self.heads, document_BT, rope)
        return leave(self.o_proj(heads), self.group, keep=self.keep_products)

    def _norm_weights(self) -> tuple[Tensor, Tensor]:
        """Of queries and keys; all heads share them, so that each rank has a part of their gradients."""
        q_weight, k_weight = local(self.q_norm.weight), local(self.k_norm.weight)
        if self.group is None:
            return q_weight, k_weight
        q_weight, k_weight = enter(torch.stack((q_weight, k_weight)), self.group).unbind()
        return q_weight, k_weight


def _implementation(kind: str, x_BTD: Tensor) -> Callable[..., Tensor]:
    if kind == "auto":
        kind = "matmul" if use_fused(x_BTD, plain=False) else "sdpa"
    return {"matmul": attention_matmul, "sdpa": attention_sdpa, "math": attention_math}[kind]


class Block(nn.Module):
    """One decoder block on an fp32 residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        plain = config.attention == "math"
        self._recompute: Recompute = "none"
        self.self_attn = Attention(config)
        self.mlp = MoE(config) if isinstance(config, MoEConfig) and has_experts(config, layer) else MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, plain=plain)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, plain=plain)

    def set_recompute(self, kind: Recompute) -> None:
        """What the backward pass computes anew, see `recomputed`."""
        self._recompute = kind
        for module in self.modules():
            if isinstance(module, Attention | MLP | MoE):
                module.keep_products = kind == "selective"

    def forward(
        self, x_BTD: Tensor, document_BT: Tensor | None = None, rope: Rope | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D) in the dtype of the input, and the auxiliary loss of its experts, if there is one.

        `rope` spares a compiled block from computing the rotary tables anew, element by element.
        """
        return recomputed(self._forward, self._recompute, x_BTD, document_BT, rope)

    def _forward(self, x_BTD: Tensor, document_BT: Tensor | None, rope: Rope | None) -> tuple[Tensor, Tensor | None]:
        # explicit casts: an addition of two dtypes is not vectorised on a CPU
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), document_BT, rope).to(x_BTD.dtype)
        out, aux = self.mlp(self.post_attention_layernorm(x_BTD)), None
        if isinstance(out, tuple):
            out, aux = out
        return x_BTD + out.to(x_BTD.dtype), aux


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.rope_shape = (config.resolved_head_dim, config.rope_theta)
        self.embed_tokens = Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, plain=config.attention == "math")

    def forward(self, input_ids_BT: Tensor, document_BT: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Token ids (B, T) -> final hidden states (B, T, D), and the auxiliary losses of the blocks that have one."""
        x_BTD = self.embed_tokens(input_ids_BT)
        if torch.is_autocast_enabled(x_BTD.device.type):
            x_BTD = upcast(x_BTD)  # a table that FSDP2 gathers in 16 bits
        rope = rope_tables(input_ids_BT.size(1), *self.rope_shape, x_BTD.device)
        losses = []
        for layer in self.layers:
            x_BTD, aux = layer(x_BTD, document_BT, rope)
            if aux is not None:
                losses.append(aux)
        return self.norm(x_BTD), losses


class GPT(nn.Module):
    """Language model. `muonlm.model.build.build_model` makes an initialised one."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.document_separator: int | None = None
        self.is_compiled = False
        self.model = Decoder(config, vocab_size)
        self.lm_head = Linear(config.hidden_size, vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's parameter, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def compile_parts(self) -> None:
        """Compile the blocks, which share their code, and the loss with torch.compile at their first use."""
        for block in self.blocks:
            block.compile()
        self.is_compiled = True

    @property
    def blocks(self) -> list[Block]:
        """The decoder blocks, in order."""
        return [layer for layer in self.model.layers if isinstance(layer, Block)]

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
            positions in nats, an fp32 scalar, whose gradient is also that of auxiliary losses.
        """
        config = self.config
        x_BTD, losses = self.model(input_ids_BT, self._documents(input_ids_BT))
        if labels_BT is None:
            return soft_cap(self.lm_head(x_BTD), config.logit_softcap)
        head = (x_BTD.flatten(0, 1), local(self.lm_head.weight), labels_BT.flatten())
        if config.attention == "math":
            loss = plain_cross_entropy(*head, cap=config.logit_softcap)
        else:
            loss = linear_cross_entropy(*head, cap=config.logit_softcap, compiled=self.is_compiled)
        if losses and isinstance(config, MoEConfig):
            # It adds its gradient, and nothing to the value, which so means the same in every run.
            auxiliary = torch.stack(losses).sum() * config.balance_coefficient
            loss = loss + (auxiliary - auxiliary.detach())
        return loss

    def _documents(self, input_ids_BT: Tensor) -> Tensor | None:
        """Number of the document of each position; the separator ends one."""
        if not self.config.document_masking:
            return None
        if self.document_separator is None:
            raise ValueError("model.document_masking needs `document_separator`, the token id that ends a document")
        is_end = (input_ids_BT == self.document_separator).long()
        return is_end.cumsum(1) - is_end
