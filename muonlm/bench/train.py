"""Training throughput of `muonlm train` against plain PyTorch loops of the same model, interleaved in one run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from muonlm.bench.plain import PlainGPT
from muonlm.config.errors import UserError
from muonlm.config.load import load_train
from muonlm.config.schema import TrainConfig
from muonlm.data.dataset import open_split
from muonlm.data.loader import BatchOrder, batch
from muonlm.data.prepare import prepare_if_missing
from muonlm.dist.precision import bfloat16_is_fast
from muonlm.model.build import build_model
from muonlm.track.metrics import read_metrics
from muonlm.train.loop import train

OURS, OURS_MUON = "muonlm train, AdamW", "muonlm train, Muon"
SAME_MODEL, STOCK = "plain loop, muonlm's model", "plain loop, stock operators"


def main(argv: list[str]) -> int:
    """`muonlm bench train`: parse, measure, print."""
    parser = argparse.ArgumentParser(prog="muonlm bench train", description=__doc__)
    parser.add_argument("config", nargs="?", default="demo", help="train config that gives the shapes [demo]")
    parser.add_argument("--steps", type=int, default=60, help="steps of each contender in a round [60]")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds [3]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON too")
    args = parser.parse_args(argv)
    if args.steps < 20 or args.rounds < 1 or args.threads < 1:
        raise UserError("muonlm bench train: --steps must be at least 20, --rounds and --threads at least 1")
    result = bench_train(args.config, steps=args.steps, rounds=args.rounds, threads=args.threads)
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


def bench_train(name: str, *, steps: int = 60, rounds: int = 3, threads: int = 1) -> dict[str, Any]:
    """Tokens per second of each contender on the shapes of train config `name`, medians over interleaved rounds.

    Every round trains each contender for `steps` steps from scratch on `threads` threads; the first ten
    steps are left out. The plain loops hold no more than forward, backward, clipping, step and a loss read every ten
    steps, as `muonlm train` records every ten. Also measures the seconds from the start of a fresh process to the
    end of its first step. Returns {"tokens_per_s": {contender: median}, "rounds": ..., "ratios": ..., "start_s": ...}.
    """
    torch.set_num_threads(threads)
    speeds: dict[str, list[float]] = {OURS: [], OURS_MUON: [], SAME_MODEL: [], STOCK: []}
    for number in range(rounds):
        for contender, values in speeds.items():
            print(f"round {number + 1} of {rounds}: {contender}", file=sys.stderr, flush=True)
            values.append(_RUNNERS[contender](name, steps, threads))
    medians = {contender: statistics.median(values) for contender, values in speeds.items()}
    return {
        "config": name,
        "threads": threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "tokens_per_s": medians,
        "rounds": speeds,
        "ratios": {
            "muonlm train / plain loop around muonlm's model": _median_ratio(speeds[OURS], speeds[SAME_MODEL]),
            "muonlm train / plain loop of stock operators": _median_ratio(speeds[OURS], speeds[STOCK]),
            "Muon / AdamW, both by muonlm train": _median_ratio(speeds[OURS_MUON], speeds[OURS]),
        },
        "start_s": _start_seconds(name, threads),
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    console = Console()
    table = Table(title=f"train config {result['config']}, {result['threads']} thread(s), torch {result['torch']}")
    table.add_column("contender")
    table.add_column("tokens/s (median)", justify="right")
    table.add_column("rounds", justify="right")
    for contender, median in result["tokens_per_s"].items():
        rounds = " ".join(f"{value:,.0f}" for value in result["rounds"][contender])
        table.add_row(contender, f"{median:,.0f}", rounds)
    console.print(table)
    console.print("Tokens per second, medians of the ratios within a round:")
    for what, ratio in result["ratios"].items():
        console.print(f"  {what}: {ratio:.2f}")
    console.print(f"start to the end of the first step in a fresh process: {result['start_s']:.1f} s")


def _median_ratio(ours: list[float], peer: list[float]) -> float:
    """Median of the ratios within rounds, which a slow phase of the machine hits on both sides."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def _config(name: str, run_dir: str, steps: int, threads: int, kind: str) -> TrainConfig:
    return load_train(
        name,
        [
            *(f"run_dir={run_dir}", f"loop.steps={steps}", f"loop.threads={threads}", f"optim.kind={kind}"),
            *("track.console=false", "track.interval_steps=10", "eval.interval_steps=0", "eval.final_tokens=1024"),
        ],
    )


def _ours(kind: str) -> Callable[[str, int, int], float]:
    def run(name: str, steps: int, threads: int) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            train(_config(name, scratch + "/run", steps, threads, kind))
            records = [r for r in read_metrics(Path(scratch) / "run") if r["kind"] == "train"]
        # By the wall clock, so that recording and everything else between the steps counts.
        first, last = records[1], records[-1]
        return float((last["tokens"] - first["tokens"]) / (last["unix_s"] - first["unix_s"]))

    return run


def _plain(stock: bool) -> Callable[[str, int, int], float]:
    def run(name: str, steps: int, threads: int) -> float:
        config = _config(name, "unused", steps, threads, "adamw")
        prepare_if_missing(config.data)
        data = open_split(config.data.path, "train", config.data.seq_len, "never")
        order = BatchOrder(data.num_sequences, config.seed)
        model: nn.Module
        if stock:
            model = PlainGPT(config.model, data.vocab_size, config.data.seq_len)
        else:
            model = build_model(config.model, data.vocab_size, config.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        fast = bfloat16_is_fast(torch.device("cpu"))
        begin, warm = time.perf_counter(), 10
        for step in range(steps):
            if step == warm:
                begin = time.perf_counter()
            ids, labels = batch(data, order, step * config.loop.batch_size, config.loop.batch_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nn.RMSNorm warns that its bf16 input meets an fp32 weight
                loss = model(ids, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                loss.item()
        return (steps - warm) * config.batch_tokens / (time.perf_counter() - begin)

    return run


_RUNNERS: dict[str, Callable[[str, int, int], float]] = {
    OURS: _ours("adamw"),
    OURS_MUON: _ours("muon"),
    SAME_MODEL: _plain(stock=False),
    STOCK: _plain(stock=True),
}


def _start_seconds(name: str, threads: int) -> float:
    """Wall time of a fresh process that trains one step, saves and ends: an upper bound on start to first step."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *(sys.executable, "-m", "muonlm", "train", name, "loop.steps=1", "schedule.warmup_steps=0"),
            *(f"run_dir={scratch}/run", "eval.interval_steps=0", f"loop.threads={threads}"),
        ]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        return time.perf_counter() - begin
