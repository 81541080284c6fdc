"""The dense feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from muonlm.config.schema import GPTConfig
from muonlm.dist.collectives import Group
from muonlm.model.layers import Linear, activate
from muonlm.model.regions import enter, leave


class MLP(nn.Module):
    """SwiGLU, or what `config.activation` and `config.gated` say; the ranks of `group` have other hidden columns."""

    def __init__(self, config: GPTConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        size, inner = config.hidden_size, intermediate_size or config.intermediate_size
        self.group: Group = None
        self.keep_products = False
        self.kind, self.plain = config.activation, config.attention == "math"
        self.gate_proj = Linear(size, inner, bias=False) if config.gated else None
        self.up_proj = Linear(size, inner, bias=False)
        self.down_proj = Linear(inner, size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x_BTD = enter(x_BTD, self.group)
        gate = None if self.gate_proj is None else self.gate_proj(x_BTD)
        hidden = activate(gate, self.up_proj(x_BTD), self.kind, plain=self.plain)
        return leave(self.down_proj(hidden), self.group, keep=self.keep_products)
