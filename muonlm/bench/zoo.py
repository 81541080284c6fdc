"""Matrices of well-known kinds of model, as data: what the balance of an optimizer is computed for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from muonlm.config.schema import GPTConfig

Cut = Literal["rows", "columns"]


class Weight(NamedTuple):
    """A hidden weight: one matrix (out, in), or a stack of `experts` such matrices.

    `cut` is the dim along which tensor parallelism cuts it: the rows of what it spreads over ranks (column-parallel),
    the columns of what it gathers from them (row-parallel).
    """

    name: str
    out_features: int
    in_features: int
    experts: int = 1
    cut: Cut = "rows"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter: (out, in) or (experts, out, in)."""
        matrix = (self.out_features, self.in_features)
        return matrix if self.experts == 1 else (self.experts, *matrix)

    @property
    def stack(self) -> tuple[int, int, int]:
        """As a stack of matrices (experts, out, in)."""
        return self.experts, self.out_features, self.in_features

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.experts * self.out_features * self.in_features


@dataclass(frozen=True)
class Model:
    """The hidden weights of a model, in order, and a sentence on what they are.

    `config` is set where `muonlm.model` can build it.
    """

    name: str
    about: str
    weights: tuple[Weight, ...]
    config: GPTConfig | None = None

    @property
    def num_matrices(self) -> int:
        """Matrices that are orthogonalized one by one."""
        return sum(weight.experts for weight in self.weights)

    @property
    def numel(self) -> int:
        """Elements of all weights."""
        return sum(weight.numel for weight in self.weights)


def gated_block(size: int, inner: int, key: int | None = None) -> list[Weight]:
    """Query, key, value, output, gate, up and down projection; `key` is the width of keys where it differs."""
    key = key or size
    return [
        *(Weight("q", size, size), Weight("k", key, size), Weight("v", key, size)),
        Weight("o", size, size, cut="columns"),
        *(Weight("gate", inner, size), Weight("up", inner, size), Weight("down", size, inner, cut="columns")),
    ]


def layers(blocks: Sequence[Sequence[Weight]]) -> tuple[Weight, ...]:
    """The weights of all blocks, their names preceded by the number of the block."""
    return tuple(
        weight._replace(name=f"{number}.{weight.name}") for number, block in enumerate(blocks) for weight in block
    )


def gpt(numel: float, name: str | None = None) -> Model:
    """A decoder of gated blocks with about `numel` hidden elements, its width 64 times its depth, more or less.

    The width is a multiple of 64, at least 64, the inner width 2.75 times that.
    """
    per_block = 4 + 3 * 2.75  # elements of a block in squares of its width
    size = max(64, 64 * round((64 * numel / per_block) ** (1 / 3) / 64))
    inner = 11 * size // 4
    depth = max(1, round(numel / (per_block * size * size)))
    about = f"{depth} block(s) of width {size}, inner width {inner}"
    config = GPTConfig(num_layers=depth, hidden_size=size, intermediate_size=inner, num_heads=size // 64)
    return Model(name or f"gpt-{numel / 1e6:.3g}m", about, layers([gated_block(size, inner)] * depth), config)


def _gpt2() -> Model:
    size = 768
    block = [
        *(Weight(name, size, size) for name in "qkv"),
        Weight("o", size, size, cut="columns"),
        Weight("fc", 4 * size, size),
        Weight("proj", size, 4 * size, cut="columns"),
    ]
    return Model("gpt-124m", "GPT-2 small, queries, keys and values apart", layers([block] * 12))


def _llama() -> Model:
    return Model("llama-7b", "Llama-7B", layers([gated_block(4096, 11008)] * 32))


def _moe(cut_experts: bool) -> Model:
    size, inner, experts = 2048, 1408, 64
    attention = [
        *(Weight("q", 3072, size), Weight("kv_a", 576, size), Weight("kv_b", 4096, 512)),
        Weight("o", size, size, cut="columns"),
    ]
    dense = gated_block(size, 11264)[4:]
    routed = [
        *(Weight("expert_gate", inner, size, experts), Weight("expert_up", inner, size, experts)),
        Weight("expert_down", size, inner, experts, cut="columns"),
        *(weight._replace(name=f"shared_{weight.name}") for weight in gated_block(size, 2 * inner)[4:]),
    ]
    blocks = [attention + (routed if number else dense) for number in range(27)]
    if cut_experts:
        return Model("moe-16b-by-expert", "the same, every rank keeping whole experts", layers(blocks))
    return Model("moe-16b", "16B-A3B mixture of 64 experts in 26 of 27 blocks, latent attention", layers(blocks))


ZOO: dict[str, Model] = {
    model.name: model
    for model in (gpt(30e6, "gpt-30m"), _gpt2(), _llama(), _moe(cut_experts=False), _moe(cut_experts=True))
}
BY_EXPERT = frozenset({"moe-16b-by-expert"})
"""Models whose expert stacks are cut between experts, as FSDP2 cuts a stack by default; the others' inside experts."""
