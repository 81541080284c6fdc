"""Newton-Schulz of this package and of its peers, side by side in one run: time, share of the matmul rate, error."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from muonlm_kernels.bench.measure import Plan, compare
from muonlm_kernels.bench.options import device_of, positive, shape_of, threads_of, writable_file
from muonlm_kernels.bench.peers import comparable_coefficients, contenders
from muonlm_kernels.bench.table import table
from muonlm_kernels.bench.timing import cpu_timer, timer_for

SHAPES = ("256x256", "512x512", "1024x1024", "768x3072", "1024x4096", "12x768x768", "200x64x256")
QUICK_SHAPES = ("64x96", "3x32x32")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `compare`. Wrong values end with one message and exit code 2."""
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape_of, metavar="MxN", help=f"MxN or KxMxN [{' '.join(SHAPES)}]")
    add("--rounds", type=positive(int), metavar="N", help="interleaved rounds of each shape, at most [15]")
    add(
        "--seconds",
        type=positive(float),
        default=30.0,
        metavar="S",
        help="of a shape [30]; what cannot make 5 rounds makes one",
    )
    add("--longest-call", type=positive(float), default=60.0, metavar="S", help="leave out slower contenders [60]")
    add("--threads", type=threads_of, metavar="N", help="CPU threads [as torch has them]")
    add("--device", type=device_of, default="auto", help="cpu, cuda or auto [auto]")
    add("--coefficients", choices=comparable_coefficients(), default="jordan", help="of the compared arm [jordan]")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="iterates of the compared arm [auto: as by default]")
    add("--input-dtype", choices=list(DTYPES), default="float32", help="of the gradients [float32]")
    add("--exact-up-to", type=int, default=2048, metavar="M", help="errors up to this shorter side; 0: none [2048]")
    add("--quick", action="store_true", help="3 rounds of small matrices: does it run?")
    add("--json", type=writable_file, metavar="FILE", help="write all figures as JSON too")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit code."""
    if args.device.type == "cpu" and args.dtype == "float16":
        print(
            "compare: float16 iterates are for a GPU; on a CPU take --dtype auto, bfloat16 or float32", file=sys.stderr
        )
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    found, missing = contenders(args.device, args.coefficients, DTYPES.get(args.dtype))
    plan = Plan(
        rounds=args.rounds or (3 if args.quick else 15),
        budget_s=args.seconds,
        longest_call_s=args.longest_call,
        input_dtype=DTYPES[args.input_dtype],
        exact_up_to=args.exact_up_to,
    )
    shapes = args.shapes or [shape_of(text) for text in (QUICK_SHAPES if args.quick else SHAPES)]
    timer = cpu_timer(0.002) if args.quick and args.device.type == "cpu" else timer_for(args.device)
    result = compare(shapes, found, missing, plan=plan, device=args.device, timer=timer)
    print(text_of(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def text_of(result: dict[str, Any]) -> str:
    """The result of `measure.compare` as text: a table for each shape, then the ratios of all shapes."""
    facts = {**result["machine"], **result["settings"]}
    ours, *others = result["shapes"][0]["contenders"]
    peers = [row["name"] for row in others if not row["ours"]]
    parts = [", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)]
    summary = []
    for block in result["shapes"]:
        ratios = {pair["peer"]: pair for pair in block["ratios"] if pair["ours"] == ours["name"]}
        summary.append([block["shape"], *(_ratio(ratios.get(peer)) for peer in peers)])
        dtype, size, rate = (block["matmul"][key] for key in ("dtype", "size", "flops_per_s"))
        matmul = f"{dtype} matmul of {size}: {rate / 1e9:.0f} GFLOP/s"
        header = ["", "coefficients", "iterates", "ms", "of matmul rate", "error", "singular values", "orth. error"]
        parts += [f"\n{block['shape']}: {block['rounds']} rounds; {matmul}"]
        parts += [table(header, [_cells(row) for row in block["contenders"]])]
        parts += [f"{row['name']}: {row['skipped']}" for row in block["contenders"] if row["skipped"]]
        parts += [
            f"{row['name']}: timed once, as a call takes {row['seconds']:.3g} s"
            for row in block["contenders"]
            if len(row.get("seconds_of_rounds", ())) == 1 < block["rounds"]
        ]
    parts += [
        "\nof matmul rate: FLOPs of 5 dense steps / time / rate of the matmul in the same rounds",
        "error: relative to the exact polar factor; singular values: smallest, median, largest",
        "orth. error: |O O^T - I| / |I|, Frobenius norms, over the shorter side",
        f"\nTime of {ours['name']} / time of the peer, median of rounds{_coverage(result)}; below 1 ours is faster",
        table(["", *peers], summary),
        *(f"{peer['name']}: {peer['reason']}" for peer in result["missing"]),
    ]
    return "\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["name"], row["coefficients"], row["iterates"]]
    if row["skipped"]:
        return [*cells, *["-"] * 5]
    cells += [f"{row['seconds'] * 1e3:.4g}", _figure(row["share_of_matmul_rate"])]
    if "relative_error" not in row:
        return [*cells, *["-"] * 3]
    values = " ".join(f"{value:.3f}" for value in row["singular_values"])
    return [*cells, f"{row['relative_error']:.3f}", values, f"{row['orthogonality_error']:.3f}"]


def _ratio(pair: dict[str, Any] | None) -> str:
    if pair is None:
        return "-"
    interval = f"[{', '.join(map(_figure, pair['interval']))}]" if pair["coverage"] else "(1 round)"
    return f"{_figure(pair['time_ratio'])} {interval}"


def _figure(value: float) -> str:
    """Two digits after the point, and two that count of smaller numbers."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _coverage(result: dict[str, Any]) -> str:
    """With few rounds the interval covers less than 95 %, and with one there is none."""
    coverages = [pair["coverage"] for block in result["shapes"] for pair in block["ratios"] if pair["coverage"]]
    return f" [{min(coverages):.0%} interval]" if coverages else ""
