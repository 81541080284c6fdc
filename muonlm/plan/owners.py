"""Who would orthogonalize what, and what travels for that: Muon's own plan, made for a run that has not started.

The layouts are those that `muonlm.optim.shards` and `muonlm.optim.zero` find on real ranks. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from muonlm.config.errors import UserError
from muonlm.config.optim import MuonConfig
from muonlm.config.schema import TrainConfig
from muonlm.optim import layout as layouts
from muonlm.optim.assign import shared_bytes, shared_flops
from muonlm.optim.buckets import Bucket, item_of, plan_buckets
from muonlm.optim.layout import Box, MeshShard, as_stack, flat_ranges, mesh_layout, replicated
from muonlm.optim.pieces import Piece, pieces_of
from muonlm.optim.plan import Plan, make_plan
from muonlm.plan.parameters import FP32_BYTES, Layout, Weight

ZERO_BUCKET_BYTES = 2**26  # the default of muonlm.optim.zero, which imports torch; a test holds the two equal
# `plan_buckets` looks at every rank for every matrix: this many looks take about a second.
_MOST_BUCKET_WORK = 4 * 10**6


@dataclass(frozen=True)
class Owners:
    """What Muon's plan comes to. Bytes are those that a rank sends in a step, on average over the ranks.

    Fields:
        num_matrices, num_shared: matrices, and how many of them several ranks share.
        flops_mean, flops_max: of Newton-Schulz in a step, of a rank on average, and of the one with most.
        num_rounds, num_exchanges: rounds, and collectives of the exchange.
        exchange_bytes: of the exchange. `exchange_kind` is "all_gather" where all ranks hold everything.
        sharing_bytes, num_sharings: of the all_reduces that sum Gram matrices, and their number on the rank with most.
    """

    num_matrices: int = 0
    num_shared: int = 0
    flops_mean: float = 0.0
    flops_max: int = 0
    num_rounds: int = 0
    exchange_kind: str = "all_to_all"
    num_exchanges: int = 0
    exchange_bytes: float = 0.0
    sharing_bytes: float = 0.0
    num_sharings: int = 0

    @property
    def imbalance(self) -> float:
        """Largest load over mean load; 1 is perfect."""
        return self.flops_max / self.flops_mean if self.flops_mean else 1.0


def zero_buckets(weights: list[Weight], num_ranks: int) -> list[Bucket] | None:
    """The flat buckets of ZeRO-1 and 2; None where there are so many matrices and ranks that it would take long."""
    matrices = sum(w.stack[0] for w in weights if w.rule == "muon")
    if matrices * num_ranks > _MOST_BUCKET_WORK:
        return None
    items = [item_of(w.shape, has_matrices=w.rule == "muon", is_stack=w.role == "experts") for w in weights[::-1]]
    return plan_buckets(items, num_ranks, ZERO_BUCKET_BYTES // FP32_BYTES)


def matrices_of(weights: list[Weight]) -> list[Piece]:
    """The matrices of what Muon updates; `param` counts these parameters. Raises UserError for a wrong split."""
    pieces: list[Piece] = []
    for number, weight in enumerate(w for w in weights if w.rule == "muon"):
        try:
            pieces += pieces_of(number, weight.name, weight.stack, weight.split)
        except UserError as error:
            raise UserError(f"optim.overrides: {error}") from None
    return pieces


def find_owners(
    config: TrainConfig, weights: list[Weight], layout: Layout, element_bytes: int, buckets: list[Bucket] | None
) -> Owners:
    """Make the plan and sum it up. `buckets` are those of `zero_buckets`, where ZeRO has any."""
    if not isinstance(config.optim, MuonConfig) or not any(w.rule == "muon" for w in weights):
        return Owners()
    plan = make_muon_plan(config, weights, layout, element_bytes, buckets)
    # Where ZeRO's buckets are not planned, every matrix is taken to have an owner.
    is_owned = buckets is None and layout.engine in ("zero1", "zero2")
    sent, calls = (0.0, 0) if is_owned else _exchange(plan)
    sharing = [shared_bytes(p.rows, p.cols, len(t), plan.steps) * len(t) for p, t in _teams(plan)]
    reductions: dict[int, int] = {}
    for _, team in _teams(plan):
        for rank in team:
            reductions[rank] = reductions.get(rank, 0) + plan.steps + 1
    loads = plan.assignment.loads_flops
    return Owners(
        num_matrices=len(plan.pieces),
        num_shared=len(sharing),
        flops_mean=sum(loads) / len(loads),
        flops_max=max(loads),
        num_rounds=plan.num_rounds,
        exchange_kind="all_gather" if plan.is_broadcast else "all_to_all",
        num_exchanges=calls,
        exchange_bytes=sent / plan.num_ranks,
        sharing_bytes=sum(sharing) / plan.num_ranks,
        num_sharings=max(reductions.values(), default=0),
    )


def make_muon_plan(
    config: TrainConfig, weights: list[Weight], layout: Layout, element_bytes: int, buckets: list[Bucket] | None
) -> Plan:
    """The plan that `muonlm.optim.muon.Muon` would make, up to the order of parameters under overrides."""
    optim = config.optim
    assert isinstance(optim, MuonConfig)
    under_muon = sorted((w for w in weights if w.rule == "muon"), key=lambda w: w.role == "experts")
    pinned: set[int] = set()
    if buckets is not None and layout.engine in ("zero1", "zero2"):
        found = _bucket_layouts(weights, buckets)
        held = [found[w.name] for w in under_muon]
        pinned = {i for i, w in enumerate(under_muon) if _is_whole(w, held[i])}
    else:
        cache: dict[tuple[object, ...], _Scanned] = {}
        held = [_mesh_layout(w, layout, cache) for w in under_muon]
        if layout.engine == "fsdp" and layout.grid.tensor == 1:  # cut between matrices alone
            pinned = {i for i, w in enumerate(under_muon) if w.role == "experts" and layout.cut_dim(w) == 0}
    return make_plan(
        matrices_of(under_muon),
        held,
        layout.num_ranks,
        element_bytes=element_bytes,
        bucket_bytes=optim.exchange.bucket_bytes,
        steps=optim.newton_schulz.steps,
        split_min_flops=2**63 if optim.newton_schulz.compensated else optim.exchange.split_min_flops,
        pinned=frozenset(pinned),
    )


@dataclass(frozen=True)
class _Scanned(layouts.Layout):
    """A layout that looks for holders only where a block is large enough: there may be 10^4 blocks and 10^2 experts."""

    @cached_property
    def _largest(self) -> tuple[int, ...]:
        return tuple(max(h.box.shape[d] for h in self.holdings) for d in range(3))

    def holders_of(self, box: Box) -> list[int]:
        """Ranks that hold all of `box` in one block, in order."""
        if any(a > b for a, b in zip(box.shape, self._largest)):
            return []
        return super().holders_of(box)


def _mesh_layout(weight: Weight, layout: Layout, cache: dict[tuple[object, ...], _Scanned]) -> _Scanned:
    """Who holds what under DDP, FSDP2, tensor and expert parallelism, and mixtures of them."""
    grid, stack, offset = layout.grid, weight.stack, 3 - len(weight.shape)
    is_dealt = weight.role == "experts" and grid.expert > 1
    key = (stack, weight.tensor_dim, is_dealt)
    if key in cache:
        return cache[key]
    ranks = tuple(range(layout.num_ranks))
    tensor = MeshShard(None if grid.tensor == 1 or weight.tensor_dim is None else weight.tensor_dim + offset)
    dim = layout.cut_dim(weight) + offset
    copies, cut = MeshShard(None), MeshShard(dim, strided=tensor.dim == dim or (is_dealt and dim == 0))
    if layout.engine != "fsdp" and grid.tensor == 1:
        made = replicated(stack, ranks)
    elif is_dealt:
        sizes = (grid.replicate, grid.shard // grid.expert, grid.expert, grid.tensor)
        made = mesh_layout(stack, (sizes, ranks), (copies, cut, MeshShard(0), tensor))
    else:
        made = mesh_layout(stack, ((grid.replicate, grid.shard, grid.tensor), ranks), (copies, cut, tensor))
    cache[key] = _Scanned(made.shape, made.holdings, made.key)
    return cache[key]


def _bucket_layouts(weights: list[Weight], buckets: list[Bucket]) -> dict[str, layouts.Layout]:
    backwards = weights[::-1]
    ranges: dict[int, list[tuple[int, int, int]]] = {}
    for bucket in buckets:
        for entry in bucket.entries:
            ranges.setdefault(entry.item, []).append((entry.rank, entry.begin, entry.end))
    return {
        backwards[item].name: flat_ranges(
            as_stack(backwards[item].shape, is_stack=backwards[item].role == "experts"), r
        )
        for item, r in ranges.items()
        if backwards[item].rule == "muon"
    }


def _is_whole(weight: Weight, held: layouts.Layout) -> bool:
    """Whether every matrix of a parameter lies whole on one rank."""
    experts, rows, cols = weight.stack
    return all(len(held.holders_of(Box((e, 0, 0), (1, rows, cols)))) == 1 for e in range(experts))


def _teams(plan: Plan) -> list[tuple[Piece, tuple[int, ...]]]:
    return [(p, t) for p, t in zip(plan.pieces, plan.assignment.workers, strict=True) if len(t) > 1]


def _exchange(plan: Plan) -> tuple[float, int]:
    """Bytes that all ranks together send in the exchange, and its collectives.

    A worker is sent what it does not hold, and sends every holder its part of the result but what it holds itself.
    """
    if plan.num_ranks == 1:
        return 0.0, 0
    if plan.is_broadcast:
        longest = sum(plan.broadcast_numel(number) for number in range(plan.num_rounds))
        return float(plan.num_ranks * (plan.num_ranks - 1) * longest * plan.element_bytes), plan.num_rounds
    total, by_round = 0.0, [0.0] * plan.num_rounds
    for piece, team, number in zip(plan.pieces, plan.assignment.workers, plan.rounds, strict=True):
        held = plan.layouts[piece.param]
        numel = piece.rows * piece.cols
        # Of a shared matrix each worker has a part, and holds as large a share of it as of the whole.
        own = sum(_held(held, piece, rank) for rank in team) / len(team)
        sent = numel - own + held.num_copies * numel - own
        total += sent
        by_round[number] += sent
    return total * plan.element_bytes, 2 * sum(sent > 0 for sent in by_round)


def _held(held: layouts.Layout, piece: Piece, rank: int) -> int:
    boxes = [holding.box.intersect(part.box) for holding in held.by_rank.get(rank, ()) for part in piece.parts]
    return sum(box.numel for box in boxes if box is not None)


def newton_schulz_flops(config: TrainConfig, weights: list[Weight]) -> int:
    """FLOPs of a step's orthogonalizations on one process: steps * (4 m^2 n + 2 m^3) a matrix, m its shorter side."""
    if not isinstance(config.optim, MuonConfig):
        return 0
    steps = config.optim.newton_schulz.steps
    return sum(shared_flops(piece.rows, piece.cols, 1, steps) for piece in matrices_of(weights))
