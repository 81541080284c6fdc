"""The parameters of a model and how a run cuts them over its ranks, from the configuration alone. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from muonlm.config.optim import MuonConfig, OverrideConfig, Role
from muonlm.config.ranks import RankGrid, rank_grid
from muonlm.config.schema import TrainConfig
from muonlm.model.flops import Shape, block_matrices, is_router
from muonlm.optim.pieces import Split
from muonlm.optim.select import is_selected, split_of

FP32_BYTES = 4
# Tensor parallelism (`muonlm.model.parallel`): rows of what reads the residual stream, columns of what writes to it.
_BY_COLUMNS = ("o_proj", "down_proj")
_CLASSES = {
    "embedding": ["Embedding"],
    "norm": ["RMSNorm"],
    "experts": ["RoutedExperts"],
    "router": ["TopKRouter", "Linear"],
}


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Fields:
        name: as in `model.named_parameters()`.
        role: embedding, hidden, experts (E, out, in), router, norm or head.
        shape: over all ranks.
        unit: the block that it belongs to, or -1 for what lies outside of the blocks.
        rule: "muon" or "adamw".
        split: the matrices that it consists of, where an override says so.
        tensor_dim: the dim that tensor parallelism cuts; None where each of its ranks has all.
    """

    name: str
    role: Role
    shape: Shape
    unit: int
    rule: str
    split: Split | None
    tensor_dim: int | None

    @property
    def numel(self) -> int:
        """Elements over all ranks."""
        return math.prod(self.shape)

    @property
    def stack(self) -> tuple[int, int, int]:
        """Its shape as a stack (E, out, in)."""
        *rest, rows, cols = (1, 1, *self.shape)
        return rest[-1], rows, cols


def weights(config: TrainConfig, vocab_size: int) -> list[Weight]:
    """All parameters, in the order of `model.named_parameters()`; a tied head is the embedding."""
    overrides = config.optim.overrides
    base = "muon" if isinstance(config.optim, MuonConfig) else "adamw"
    found = []
    for name, role, shape, unit in _named(config, vocab_size):
        rule, split = _rule(name, role, base, overrides)
        tensor_dim = None
        if role in ("hidden", "experts"):
            by_columns = any(part in name for part in _BY_COLUMNS)
            tensor_dim = len(shape) - (1 if by_columns else 2)
        found.append(Weight(name, role, shape, unit, rule, split, tensor_dim))
    return found


def _named(config: TrainConfig, vocab_size: int) -> Iterator[tuple[str, Role, Shape, int]]:
    model = config.model
    size, head = model.hidden_size, model.resolved_head_dim
    yield "model.embed_tokens.weight", "embedding", (vocab_size, size), -1
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for name, shape in block_matrices(model, layer).items():
            role: Role = "experts" if len(shape) == 3 else "router" if is_router(name) else "hidden"
            yield prefix + name, role, shape, layer
            if name == "self_attn.o_proj.weight":
                yield f"{prefix}self_attn.q_norm.weight", "norm", (head,), layer
                yield f"{prefix}self_attn.k_norm.weight", "norm", (head,), layer
        yield f"{prefix}input_layernorm.weight", "norm", (size,), layer
        yield f"{prefix}post_attention_layernorm.weight", "norm", (size,), layer
    yield "model.norm.weight", "norm", (size,), -1
    if not model.tie_embeddings:
        yield "lm_head.weight", "head", (vocab_size, size), -1


def _rule(name: str, role: Role, base: str, overrides: list[OverrideConfig]) -> tuple[str, Split | None]:
    rule, split = base if role in ("hidden", "experts") else "adamw", None
    for override in overrides:
        if is_selected(override, names=[name], role=role, classes=_CLASSES.get(role, ["Linear"])):
            rule, split = override.rule or rule, split_of(override.split) or split
    return rule, split if rule == "muon" else None


@dataclass(frozen=True)
class Layout:
    """How a run's ranks share the parameters: their grid, and the engine that averages gradients.

    `engine` is "none" (one data-parallel rank), "ddp", "zero1", "zero2" or "fsdp", as `muonlm.train.setup` chooses.
    """

    grid: RankGrid
    engine: str

    @property
    def num_ranks(self) -> int:
        """Ranks in all."""
        return self.grid.data * self.grid.tensor

    def shards(self, weight: Weight) -> int:
        """Ranks that FSDP2 cuts a (part of a) parameter over."""
        if self.engine != "fsdp":
            return 1
        return self.grid.shard // self.grid.expert if weight.role == "experts" else self.grid.shard

    def cut_dim(self, weight: Weight) -> int:
        """The dim that FSDP2 cuts (`muonlm.dist.wrap`): the first; of experts under expert parallelism the first that
        divides evenly, if there is one."""
        if weight.role != "experts" or self.grid.expert == 1:
            return 0
        num_ranks = self.shards(weight)
        return next((dim for dim, size in enumerate(self._here(weight)) if size % num_ranks == 0), 0)

    def whole_numel(self, weight: Weight) -> int:
        """Elements of a parameter as a rank computes with it: its tensor-parallel part, and its experts."""
        return math.prod(self._here(weight))

    def local_numel(self, weight: Weight) -> int:
        """Elements that the rank with most keeps of a parameter; of all, not of ZeRO's part.

        FSDP2 cuts a dim of n over S ranks into ceil(n / S), and sends as many for the ranks that have fewer.
        """
        shape, dim = self._here(weight), self.cut_dim(weight)
        shape[dim] = -(-shape[dim] // self.shards(weight))
        return math.prod(shape)

    def _here(self, weight: Weight) -> list[int]:
        shape = list(weight.shape)
        if weight.tensor_dim is not None:
            shape[weight.tensor_dim] //= self.grid.tensor
        if weight.role == "experts":
            shape[0] //= self.grid.expert
        return shape


def layout_of(config: TrainConfig, world_size: int) -> Layout:
    """The layout that `config.dist` leads to. Raises UserError where the ranks do not divide as it asks."""
    grid = rank_grid(config, world_size)
    if grid.shard > 1 or (config.dist.zero == 3 and grid.replicate > 1 and grid.tensor > 1):
        engine = "fsdp"
    elif grid.data == 1:
        engine = "none"
    else:
        engine = {1: "zero1", 2: "zero2"}.get(config.dist.zero, "ddp")
    return Layout(grid, engine)


def gather_bytes(config: TrainConfig, device: str) -> int:
    """Bytes of an element that FSDP2 gathers for the forward and backward pass on a "cuda" or "cpu" `device`."""
    kind = config.dist.gather_dtype
    is_short = kind == "bfloat16" or (kind == "auto" and device == "cuda" and compute_bytes(config, device) == 2)
    return 2 if is_short else FP32_BYTES


def compute_bytes(config: TrainConfig, device: str) -> int:
    """Bytes of an element of matrix products; "auto" precision is taken as bfloat16 on GPUs, as float32 on CPUs."""
    kind = config.loop.precision
    return 2 if kind == "bfloat16" or (kind == "auto" and device == "cuda") else FP32_BYTES


def wire_bytes(config: TrainConfig, device: str) -> int:
    """Bytes of an element of the updates that Muon's exchange sends."""
    assert isinstance(config.optim, MuonConfig)
    kind = config.optim.newton_schulz.dtype
    is_short = kind == "bfloat16" or (kind == "auto" and device == "cuda")
    return 2 if is_short and not config.optim.newton_schulz.compensated else FP32_BYTES


def momentum_bytes(config: TrainConfig) -> int:
    """Bytes of an element of the momentum."""
    optim = config.optim
    return 2 if isinstance(optim, MuonConfig) and optim.momentum_dtype == "bfloat16" else FP32_BYTES
