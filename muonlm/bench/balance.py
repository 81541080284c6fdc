"""Who would compute what: load, rounds and bytes of a Muon step on any number of ranks, by the plan alone."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from muonlm.bench.costs import exchange_bytes
from muonlm.bench.zoo import BY_EXPERT, ZOO, Model
from muonlm.optim.assign import shared_bytes
from muonlm.optim.layout import Layout, MeshShard, mesh_layout
from muonlm.optim.pieces import Piece, pieces_of
from muonlm.optim.plan import Plan, make_plan
from muonlm_kernels import matmul_flops
from muonlm_kernels.bench.options import positive, writable_file
from muonlm_kernels.bench.table import table

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MODELS = ("gpt-124m", "llama-7b", "moe-16b", "moe-16b-by-expert")
SCHEMA = "muonlm-bench-balance/1"


def main(argv: list[str], prog: str) -> int:
    """Parse, compute, print."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(ZOO), default=list(MODELS), metavar="NAME", help=", ".join(ZOO))
    add("--ranks", nargs="+", type=positive(int), default=list(RANKS), metavar="N", help="numbers of ranks")
    add("--bucket-mb", type=positive(float), default=128.0, metavar="MB", help="assembled at a time, in 2^20 B [128]")
    add("--json", type=writable_file, metavar="FILE", help="write all figures as JSON too")
    args = parser.parse_args(argv)
    results = []
    for name in args.models:
        rows = []
        for ranks in args.ranks:
            print(f"{name} on {ranks} ranks ...", file=sys.stderr, flush=True)
            rows.append(balance_of(ZOO[name], int(ranks), round(args.bucket_mb * 2**20)))
        results.append({"model": name, "about": ZOO[name].about, "rows": rows})
        print(f"{name}: {ZOO[name].about}, {ZOO[name].num_matrices} matrices, {ZOO[name].numel:,} elements\n")
        print(text_of(rows) + "\n", flush=True)
    print(_LEGEND)
    if args.json:
        args.json.write_text(json.dumps({"schema": SCHEMA, "models": results}, indent=1) + "\n")
    return 0


def plan_of(model: Model, num_ranks: int, bucket_bytes: int = 2**27) -> Plan:
    """The plan of a model whose weights FSDP2 cuts over `num_ranks` ranks, updates travelling in two bytes.

    Matrices are cut into rows; expert stacks into the rows of each expert, or, for models in BY_EXPERT, between
    experts, which are then computed where they lie.
    """
    by_expert = model.name in BY_EXPERT
    mesh = ((num_ranks,), tuple(range(num_ranks)))
    layouts: list[Layout] = []
    pieces: list[Piece] = []
    for index, weight in enumerate(model.weights):
        dim = 0 if by_expert and weight.experts > 1 else 1
        layouts.append(mesh_layout(weight.stack, mesh, (MeshShard(dim),)))
        pieces += pieces_of(index, weight.name, weight.stack, None)
    pinned = frozenset(i for i, weight in enumerate(model.weights) if by_expert and weight.experts > 1)
    return make_plan(pieces, layouts, num_ranks, bucket_bytes=bucket_bytes, pinned=pinned)


def balance_of(model: Model, num_ranks: int, bucket_bytes: int = 2**27) -> dict[str, Any]:
    """Figures of one model on one number of ranks. Loads are FLOPs, those that sharing adds included.

    `max_over_perfect` compares the busiest rank with an even share of the FLOPs that one process would need.
    """
    begin = time.perf_counter()
    plan = plan_of(model, num_ranks, bucket_bytes)
    loads, workers = plan.assignment.loads_flops, plan.assignment.workers
    assembled, reduced = [0.0] * num_ranks, [0.0] * num_ranks
    for piece, team in zip(plan.pieces, workers, strict=True):
        for rank in team:
            assembled[rank] += piece.rows * piece.cols / len(team)
            reduced[rank] += shared_bytes(piece.rows, piece.cols, len(team), plan.steps)
    busiest = assembled.index(max(assembled))
    dense = sum(matmul_flops(piece.rows, piece.cols, plan.steps) for piece in plan.pieces)
    travels = [
        piece.rows * piece.cols
        for piece, team in zip(plan.pieces, workers, strict=True)
        if plan.layouts[piece.param].holders_of(piece.bounds) != list(team)
    ]
    return {
        "ranks": num_ranks,
        "max_over_mean": plan.assignment.imbalance,
        "max_over_perfect": max(loads) * num_ranks / dense,
        "shared": sum(len(team) > 1 for team in workers),
        "teams": len({team for team in workers if len(team) > 1}),
        "largest_team": max(map(len, workers)),
        "rounds": plan.num_rounds,
        "formula_bytes": exchange_bytes(sum(travels), plan.element_bytes, shards=num_ranks),
        "busiest_bytes": sum(plan.bytes_sent(busiest).values()),
        "busiest_shared_bytes": max(reduced),
        "seconds": time.perf_counter() - begin,
    }


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """A table, a line for each number of ranks."""
    return table(
        (
            *("ranks", "max/mean", "max/perfect", "shared", "largest team", "rounds"),
            *("MB by formula", "MB, busiest", "MB of sharing", "planned in"),
        ),
        [
            (
                str(row["ranks"]),
                f"{row['max_over_mean']:.3f}",
                f"{row['max_over_perfect']:.3f}",
                str(row["shared"]),
                str(row["largest_team"]),
                str(row["rounds"]),
                f"{row['formula_bytes'] / 1e6:,.1f}",
                f"{row['busiest_bytes'] / 1e6:,.1f}",
                f"{row['busiest_shared_bytes'] / 1e6:,.1f}",
                f"{row['seconds']:.1f} s",
            )
            for row in rows
        ],
    )


_LEGEND = """max/mean: load of the busiest rank over the mean, in FLOPs. max/perfect: over an even share of what one
process computes. shared: matrices that several ranks compute together. MB: sent by a rank in a step, on average by the
formula 2 (D - 1) / D^2 P b, by the rank with most to compute, and at most for the all_reduces of shared matrices."""
