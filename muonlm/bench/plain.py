"""The peer: the same Qwen3 model and AdamW loop as anybody would write them with stock PyTorch operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from muonlm.config.schema import GPTConfig


class PlainBlock(nn.Module):
    """Pre-norm attention with rotary positions and QK-norm, then SwiGLU."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.resolved_kv_heads, c.resolved_head_dim
        self.q = nn.Linear(c.hidden_size, self.heads * self.head_dim, bias=False)
        self.k = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=c.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=c.rms_norm_eps)
        self.gate = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.norm1 = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.norm2 = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def forward(self, x_BTD: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
        """Residual stream in, residual stream out."""
        b, t, _ = x_BTD.shape
        h = self.norm1(x_BTD)
        q = self.q_norm(self.q(h).view(b, t, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(h).view(b, t, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(h).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos_TH, sin_TH), _rotate(k, cos_TH, sin_TH)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x_BTD = x_BTD + self.o(y.transpose(1, 2).reshape(b, t, -1))
        h = self.norm2(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainGPT(nn.Module):
    """Embedding, blocks, norm, untied head; `forward` returns the mean cross-entropy."""

    def __init__(self, c: GPTConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.head = nn.Linear(c.hidden_size, vocab_size, bias=False)
        inverse = c.rope_theta ** (-torch.arange(0, c.resolved_head_dim, 2) / c.resolved_head_dim)
        angles = torch.outer(torch.arange(seq_len), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats per token."""
        x = self.embed(ids_BT)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels_BT.flatten())


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
