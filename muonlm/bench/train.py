"""Training throughput of `muonlm train` against the Hugging Face Trainer and plain PyTorch loops, interleaved.

All train the same shapes on the same sequences, with the same batch, threads and precision, in one process.
"""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from muonlm.bench.peers_transformers import missing_packages, trainer_seconds
from muonlm.bench.plain import PlainGPT
from muonlm.config.errors import UserError
from muonlm.config.load import load_train
from muonlm.config.schema import TrainConfig
from muonlm.data.dataset import TokenDataset, open_split
from muonlm.data.loader import BatchOrder, batch
from muonlm.data.prepare import prepare_if_missing
from muonlm.dist.precision import bfloat16_is_fast
from muonlm.model.build import build_model
from muonlm.track.metrics import read_metrics
from muonlm.train import step as train_step
from muonlm.train.loop import train

OURS, OURS_MUON = "muonlm train, AdamW", "muonlm train, Muon"
TRAINER = "Hugging Face Trainer, Qwen3ForCausalLM"
SAME_MODEL, STOCK, COMPILED = (
    "plain loop, muonlm's model",
    "plain loop, stock operators",
    "plain loop, stock operators, torch.compile",
)
WARM_STEPS = 10


@dataclass(frozen=True)
class Speed:
    """Of one contender in one round; the shares of the time are known of `muonlm train` alone.

    `loading` is what reading batches takes, `recording` all that happens between the steps: measuring and writing
    records, and the run's status.
    """

    tokens_per_s: float
    loading: float = 0.0
    recording: float = 0.0


def main(argv: list[str]) -> int:
    """`muonlm bench train`: parse, measure, print."""
    parser = argparse.ArgumentParser(prog="muonlm bench train", description=__doc__)
    parser.add_argument("config", nargs="?", default="gpt-10m", help="train config that gives the shapes [gpt-10m]")
    parser.add_argument("--steps", type=int, default=30, help="steps of each contender in a round [30]")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds [3]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto", help="of all [auto]")
    parser.add_argument("--compile", action="store_true", help="add the loop of stock operators under torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON too")
    args = parser.parse_args(argv)
    if args.steps < 20 or args.rounds < 1 or args.threads < 1:
        raise UserError("muonlm bench train: --steps must be at least 20, --rounds and --threads at least 1")
    result = bench_train(
        args.config,
        steps=args.steps,
        rounds=args.rounds,
        threads=args.threads,
        precision=args.precision,
        compiled=args.compile,
    )
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


def bench_train(
    name: str, *, steps: int = 30, rounds: int = 3, threads: int = 1, precision: str = "auto", compiled: bool = False
) -> dict[str, Any]:
    """Tokens per second of each contender on the shapes of train config `name`, medians over interleaved rounds.

    Every round trains each contender for `steps` steps from scratch on `threads` threads; the first ten
    steps are left out. The plain loops hold no more than forward, backward, clipping, step and a loss read every ten
    steps, as `muonlm train` records every ten and the Trainer logs. The Trainer is left out where its packages are not
    installed. Also measures the seconds from the start of a fresh process to the end of its first step. Returns
    {"tokens_per_s": {contender: median}, "rounds": ..., "ratios": ..., "shares": ..., "start_s": ...}.
    """
    torch.set_num_threads(threads)
    contenders = [OURS, SAME_MODEL, STOCK, *([COMPILED] if compiled else []), OURS_MUON]
    if missing := missing_packages():
        print(f"without the Hugging Face Trainer: {' and '.join(missing)} not installed", file=sys.stderr)
    else:
        contenders.insert(1, TRAINER)
    speeds: dict[str, list[Speed]] = {contender: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders:
            print(f"round {number + 1} of {rounds}: {contender}", file=sys.stderr, flush=True)
            speeds[contender].append(_RUNNERS[contender](name, steps, threads, precision))
    tokens_per_s = {contender: [speed.tokens_per_s for speed in found] for contender, found in speeds.items()}
    peers = [contender for contender in contenders if contender not in (OURS, OURS_MUON)]
    return {
        "config": name,
        "threads": threads,
        "precision": "bfloat16" if _is_bfloat16(precision) else "float32",
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "tokens_per_s": {contender: statistics.median(values) for contender, values in tokens_per_s.items()},
        "rounds": tokens_per_s,
        "ratios": {
            **{f"{OURS} / {peer}": _median_ratio(tokens_per_s[OURS], tokens_per_s[peer]) for peer in peers},
            "Muon / AdamW, both by muonlm train": _median_ratio(tokens_per_s[OURS_MUON], tokens_per_s[OURS]),
        },
        "shares": {
            "loading": statistics.median(speed.loading for speed in speeds[OURS]),
            "recording": statistics.median(speed.recording for speed in speeds[OURS]),
        },
        "start_s": _start_seconds(name, threads, precision),
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    console = Console()
    title = f"{result['config']}, {result['threads']} thread(s), {result['precision']}, torch {result['torch']}"
    table = Table(title=f"train config {title}")
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
    shares = result["shares"]
    console.print(
        f"of the time of {OURS}: loading batches {shares['loading']:.2%}, measuring and recording "
        f"{shares['recording']:.2%}"
    )
    console.print(f"start to the end of the first step in a fresh process: {result['start_s']:.1f} s")


def _median_ratio(ours: list[float], peer: list[float]) -> float:
    """Median of the ratios within rounds, which a slow phase of the machine hits on both sides."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def _is_bfloat16(precision: str) -> bool:
    return bfloat16_is_fast(torch.device("cpu")) if precision == "auto" else precision == "bfloat16"


def _config(name: str, run_dir: str, steps: int, threads: int, precision: str, kind: str) -> TrainConfig:
    return load_train(
        name,
        [
            *(f"run_dir={run_dir}", f"loop.steps={steps}", f"loop.threads={threads}", f"optim.kind={kind}"),
            *("track.console=false", "track.interval_steps=10", "eval.interval_steps=0", "eval.final_tokens=1024"),
            *(f"loop.precision={precision}", "loop.device=cpu", f"schedule.warmup_steps={WARM_STEPS}"),
        ],
    )


def _ours(kind: str) -> Callable[[str, int, int, str], Speed]:
    def run(name: str, steps: int, threads: int, precision: str) -> Speed:
        with tempfile.TemporaryDirectory() as scratch, _timed_loading() as loads:
            train(_config(name, scratch + "/run", steps, threads, precision, kind))
            records = [r for r in read_metrics(Path(scratch) / "run") if r["kind"] == "train"]
        # By the wall clock, so that recording and everything else between the steps counts.
        first, last = records[1], records[-1]
        wall_s = last["unix_s"] - first["unix_s"]
        loading_s = statistics.mean(loads[WARM_STEPS:]) * (last["step"] - first["step"])
        return Speed(
            tokens_per_s=(last["tokens"] - first["tokens"]) / wall_s,
            loading=loading_s / wall_s,
            recording=1 - (last["time_s"] - first["time_s"]) / wall_s,
        )

    return run


@contextmanager
def _timed_loading() -> Iterator[list[float]]:
    """Seconds that each batch of a run inside takes to load."""
    seconds: list[float] = []
    load = train_step.batch

    def timed(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        begin = time.perf_counter()
        loaded = load(*args)
        seconds.append(time.perf_counter() - begin)
        return loaded

    with patch.object(train_step, "batch", timed):
        yield seconds


def _open(name: str, steps: int, threads: int, precision: str) -> tuple[TrainConfig, TokenDataset, BatchOrder]:
    config = _config(name, "unused", steps, threads, precision, "adamw")
    prepare_if_missing(config.data)
    data = open_split(config.data.path, "train", config.data.seq_len, "never")
    return config, data, BatchOrder(data.num_sequences, config.seed)


def _trainer(name: str, steps: int, threads: int, precision: str) -> Speed:
    config, data, order = _open(name, steps, threads, precision)
    seconds = trainer_seconds(config, data, order, warm_steps=WARM_STEPS, bfloat16=_is_bfloat16(precision))
    return Speed((steps - WARM_STEPS) * config.batch_tokens / seconds)


def _plain(*, stock: bool, compiled: bool = False) -> Callable[[str, int, int, str], Speed]:
    def run(name: str, steps: int, threads: int, precision: str) -> Speed:
        config, data, order = _open(name, steps, threads, precision)
        model: nn.Module
        if stock:
            model = PlainGPT(config.model, data.vocab_size, config.data.seq_len)
        else:
            model = build_model(config.model, data.vocab_size, config.seed)
        if compiled:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        begin, bfloat16 = time.perf_counter(), _is_bfloat16(precision)
        for step in range(steps):
            if step == WARM_STEPS:
                begin = time.perf_counter()
            ids, labels = batch(data, order, step * config.loop.batch_size, config.loop.batch_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nn.RMSNorm warns that its bf16 input meets an fp32 weight
                loss = model(ids, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                loss.item()
        return Speed((steps - WARM_STEPS) * config.batch_tokens / (time.perf_counter() - begin))

    return run


_RUNNERS: dict[str, Callable[[str, int, int, str], Speed]] = {
    OURS: _ours("adamw"),
    OURS_MUON: _ours("muon"),
    TRAINER: _trainer,
    SAME_MODEL: _plain(stock=False),
    STOCK: _plain(stock=True),
    COMPILED: _plain(stock=True, compiled=True),
}


def _start_seconds(name: str, threads: int, precision: str) -> float:
    """Wall time of a fresh process that trains one step, saves and ends: an upper bound on start to first step."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *(sys.executable, "-m", "muonlm", "train", name, "loop.steps=1", "schedule.warmup_steps=0"),
            *(f"run_dir={scratch}/run", "eval.interval_steps=0", "eval.final_tokens=1024", f"loop.threads={threads}"),
            *(f"loop.precision={precision}", "loop.device=cpu"),
        ]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        return time.perf_counter() - begin
