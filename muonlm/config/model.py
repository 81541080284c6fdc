"""The models: their shapes, and the options of their parts. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from muonlm.config.section import Section, field


class GPTConfig(Section):
    """Dense decoder with RMSNorm, rotary positions, QK-norm, grouped-query attention and SwiGLU (Qwen3)."""

    kind: Literal["gpt"] = field("gpt", "Model family: gpt is dense, moe has experts.")
    vocab_size: int | None = field(
        None, "Number of token ids: that of the data when unset, at least that when set (padding).", ge=2
    )
    num_layers: int = field(4, "Decoder blocks.", ge=1)
    hidden_size: int = field(128, "Width of the residual stream.", ge=2)
    intermediate_size: int = field(384, "Width of the hidden layer of the dense feed-forward layers.", ge=1)
    num_heads: int = field(4, "Query heads.", ge=1)
    num_kv_heads: int | None = field(None, "Key and value heads; equal to num_heads when unset.", ge=1)
    head_dim: int | None = field(None, "Width of one head; hidden_size / num_heads when unset.", ge=2)
    rope_theta: float = field(10_000.0, "Base of the rotary frequencies.", gt=0)
    max_seq_len: int = field(
        32_768, "Longest context that the rotary positions are meant for; data.seq_len may not exceed it.", ge=2
    )
    rms_norm_eps: float = field(1e-6, "Added to the mean square in RMSNorm.", gt=0)
    tie_embeddings: bool = field(False, "Share the input embedding with the output head.")
    init_std: float = field(0.02, "Standard deviation of the normal initialisation.", gt=0)
    base_width: int | None = field(
        None,
        "hidden_size at which init_std and the learning rates were tuned: both are carried over to hidden_size (muP, "
        "docs/transfer.md). They hold as they are when unset.",
        ge=2,
    )
    activation: Literal["silu", "relu2"] = field(
        "silu", "Of the feed-forward layers: silu, or relu2, the square of the positive part (arXiv:2109.08668)."
    )
    gated: bool = field(True, "Whether a second projection multiplies the activation (SwiGLU).")
    logit_softcap: float | None = field(
        None, "Bounds the logits to +-c by c * tanh(logits / c) (arXiv:2408.00118); off when unset.", ge=1e-3
    )
    document_masking: bool = field(
        False, "Attend within a document only: the data's document separator starts the next one."
    )
    attention: Literal["auto", "matmul", "sdpa", "math"] = field(
        "auto",
        "Attention implementation: auto takes matmul on CPU and scaled_dot_product_attention on GPU; math composes "
        "the whole model of operations that can be differentiated twice.",
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; "
                "change one of them or set head_dim"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(f"head_dim {self.resolved_head_dim} is odd; rotary positions need an even one")
        if self.num_heads % self.resolved_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @model_validator(mode="after")
    def _width_transfers(self) -> Self:
        if self.base_width is None:
            return self
        if self.tie_embeddings:
            raise ValueError(
                "base_width needs tie_embeddings = false: with the width, the learning rate of a head falls and that "
                "of an embedding stays, so that one table cannot have both"
            )
        if self.head_dim is None:
            raise ValueError(
                f"base_width needs head_dim, the same as at width {self.base_width}: width is added in heads, and a "
                "head of another size would need another learning rate"
            )
        return self

    @property
    def width_ratio(self) -> float:
        """hidden_size / base_width, 1 where base_width is unset."""
        return self.hidden_size / self.base_width if self.base_width else 1.0

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def resolved_kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    def undivided_by(self, size: int) -> list[str]:
        """What tensor parallelism over `size` ranks would have to divide and does not, with its value."""
        divided = {
            "model.num_heads": self.num_heads,
            "model.num_kv_heads": self.resolved_kv_heads,
            "model.intermediate_size": self.intermediate_size,
        }
        return [f"{name} {value}" for name, value in divided.items() if value % size]


class MoEConfig(GPTConfig):
    """Decoder whose feed-forward layers are mixtures of experts, without dropped tokens (GLM-4-MoE, Qwen3-MoE)."""

    kind: Literal["moe"] = field("moe", "Model family: gpt is dense, moe has experts.")  # type: ignore[assignment]
    num_experts: int = field(8, "Routed experts of a layer.", ge=2)
    experts_per_token: int = field(2, "Experts that each token goes to.", ge=1)
    expert_size: int = field(128, "Width of the hidden layer of one expert.", ge=1)
    num_shared_experts: int = field(1, "Experts that every token goes to, computed as one of their joint width.", ge=0)
    num_dense_layers: int = field(1, "First layers that have no experts, but one layer of intermediate_size.", ge=0)
    router: Literal["sigmoid", "softmax"] = field(
        "sigmoid", "Scores of the experts: each by itself (DeepSeek-V3, arXiv:2412.19437), or a distribution over all."
    )
    normalize_weights: bool = field(True, "Whether the weights of a token's experts are divided by their sum.")
    routed_scale: float = field(1.0, "Factor on the sum of the routed experts.", gt=0, le=1e4)
    balance: Literal["bias", "loss", "none"] = field(
        "bias",
        "Even loads: bias is added to the scores for the choice alone and moves after each step (arXiv:2408.15664); "
        "loss adds an auxiliary loss (arXiv:2101.03961).",
    )
    bias_rate: float = field(1e-3, "Change of an expert's bias in a step (balance = bias).", ge=0, le=1)
    balance_coefficient: float = field(1e-2, "Weight of the auxiliary loss of each layer (balance = loss).", ge=0)
    experts: Literal["auto", "grouped", "loop", "reference"] = field(
        "auto",
        "Implementation of the experts: grouped matrix products (auto on GPU), a loop over slices with hand-written "
        "gradients (auto on CPU), or a plain composition, the reference of both.",
    )

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}")
        if self.num_dense_layers >= self.num_layers:
            raise ValueError(
                f"num_dense_layers {self.num_dense_layers} leaves none of the {self.num_layers} layers with experts; "
                'lower it, or take kind = "gpt"'
            )
        if self.experts == "grouped" and (self.hidden_size % 8 or self.expert_size % 8):
            raise ValueError(
                f'experts = "grouped" needs hidden_size {self.hidden_size} and expert_size {self.expert_size} to be '
                'multiples of 8; leave it "auto"'
            )
        if self.balance == "bias" and self.router == "softmax":
            raise ValueError('balance = "bias" needs router = "sigmoid"; take balance = "loss" with softmax')
        return self

    @property
    def shared_size(self) -> int:
        """Width of the hidden layer of the shared experts together."""
        return self.num_shared_experts * self.expert_size

    def undivided_by(self, size: int) -> list[str]:
        """What tensor parallelism over `size` ranks would have to divide and does not, with its value."""
        undivided = super().undivided_by(size)
        return [*undivided, f"model.expert_size {self.expert_size}"] if self.expert_size % size else undivided


ModelConfig = Annotated[GPTConfig | MoEConfig, Field(discriminator="kind")]
