"""A tiny run on real text, processes that train it and are sent signals, and what is compared afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from muonlm.checkpoint import store
from muonlm.config.schema import TrainConfig
from muonlm.dist import process
from muonlm.model.build import build_model
from muonlm.optim.build import build_optimizer
from muonlm.track.metrics import read_metrics
from muonlm.train.loop import RunStatus, train
from muonlm.train.setup import build
from muonlm.train.step import take_step

NUM_STEPS = 36
BATCH = 12
# The losses begin at 6.3. One unit in the last place is 5e-7 there, and layouts differ by up to three: 1.4e-6 was the
# most over all of them. Without one of the sums it is more than 1e-4 within ten steps.
TOLERANCE = 1e-5
_ALONE: dict[str, dict[str, Any]] = {}


@pytest.fixture
def make_config(stdlib_data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`make_config(run="a", **{"loop.steps": 3})`: a config of the tiny run, with dotted changes."""

    def make(run: str = "a", **changes: Any) -> TrainConfig:
        raw: dict[str, Any] = {
            "name": "tiny",
            "run_dir": str(tmp_path / run),
            "data": {"path": str(stdlib_data), "seq_len": 32},
            "model": {"kind": "gpt", "num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
            "optim": {"kind": "muon"},
            "schedule": {"warmup_steps": 3},
            "loop": {"steps": NUM_STEPS, "batch_size": 6, "threads": 1, "precision": "float32", "device": "cpu"},
            "eval": {"interval_steps": 8, "tokens": 200, "final_tokens": 300},
            "checkpoint": {"interval_steps": 5},
            "track": {"interval_steps": 1, "console": False},
        }
        for key, value in changes.items():
            *tables, last = key.split(".")
            target = raw
            for table in tables:
                target = target.setdefault(table, {})
            target[last] = value
        return TrainConfig.model_validate(raw)

    return make


@pytest.fixture
def train_ranks(run_ranks: Callable[..., list[Any]]) -> Callable[..., list[RunStatus]]:
    """`train_ranks(config, size, at=step, signal=SIGTERM, on=rank)`: train in processes of their own.

    Rank `on` sends itself the signal, from another thread, once the record of step `at` is written.
    """

    def run(
        config: TrainConfig, size: int = 1, *, at: int | None = None, signum: int = signal.SIGTERM, on: int = 0
    ) -> list[RunStatus]:
        def one_rank(rank: int, size: int) -> RunStatus:
            if at is not None and rank == on:
                threading.Thread(target=_signal_self, args=(config, at, signum), daemon=True).start()
            return train(config)

        return run_ranks(one_rank, size, join=False)

    return run


def _signal_self(config: TrainConfig, at: int, signum: int) -> None:
    while max((r["step"] for r in read_metrics(config.resolved_run_dir)), default=0) < at:
        time.sleep(0.002)
    os.kill(os.getpid(), signum)


def _curve(config: TrainConfig, num_steps: int) -> dict[str, Any]:
    """Losses of the first steps of a run, gradient and update norms of the last, and the weights it ends with."""
    parts = build(config, process.start(config.dist, "cpu"), {})
    results = [take_step(parts, i, i * BATCH, measure=True, stop=False) for i in range(num_steps)]
    last = results[-1]
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().numpy().tobytes()
        for name, p in parts.model.state_dict().items()
    }
    return {
        "loss": [result.loss for result in results],
        "norms": {"total": last.grads.total}
        | {f"gradient of {name}": norm for name, norm in last.grads.by_group.items()}
        | {f"update of {name}": norm for name, norm in last.updates.by_group.items()},
        "weights": weights,
        "balance": [result.balance for result in results],
    }


@pytest.fixture
def curves(
    make_config: Callable[..., TrainConfig], run_ranks: Callable[..., list[Any]]
) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]:
    """`curves(size, dist, num_steps, **changes)`: those of all ranks of a layout, and that of one process."""

    def run(
        size: int, dist: dict[str, Any], num_steps: int = 50, *, timeout_s: float = 60.0, **changes: Any
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        changes = {"loop.batch_size": BATCH, "model.num_heads": 4, "model.num_kv_heads": 2, **changes}
        key = json.dumps([num_steps, changes], sort_keys=True)
        if key not in _ALONE:
            whole = make_config(**{**changes, "loop.micro_batch_size": None})
            [_ALONE[key]] = run_ranks(lambda rank, size: _curve(whole, num_steps), 1, join=False, timeout_s=timeout_s)
        config = make_config(**changes, dist=dist)
        ranks = run_ranks(lambda rank, size: _curve(config, num_steps), size, join=False, timeout_s=timeout_s)
        return ranks, _ALONE[key]

    return run


@pytest.fixture
def largest_difference() -> Callable[[dict[str, Any], dict[str, Any]], float]:
    """`largest_difference(ours, theirs)`: of the losses of two curves."""

    def find(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
        found = max(abs(a - b) for a, b in zip(ours["loss"], theirs["loss"], strict=True))
        print("largest difference of a loss", found)
        return found

    return find


@pytest.fixture
def assert_same_curve(
    largest_difference: Callable[..., float],
) -> Callable[[list[dict[str, Any]], dict[str, Any]], None]:
    """`assert_same_curve(ranks, alone)`: all ranks have the curve of one process, and the same bits."""

    def check(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
        assert largest_difference(ranks[0], alone) < TOLERANCE
        assert ranks[0]["norms"] == pytest.approx(alone["norms"], rel=1e-3)
        for result in ranks[1:]:
            assert result == ranks[0]  # the copies of a parameter too, bit for bit

    return check


@pytest.fixture
def assert_same_records() -> Callable[[TrainConfig, TrainConfig], None]:
    """`assert_same_records(ours, theirs)`: two runs recorded the same steps, with the same losses and norms."""

    def check(ours: TrainConfig, theirs: TrainConfig) -> None:
        records = [[r for r in read_metrics(c.resolved_run_dir) if r["kind"] != "event"] for c in (ours, theirs)]
        for mine, whole in zip(*records, strict=True):
            assert (mine["kind"], mine["step"], mine["tokens"]) == (whole["kind"], whole["step"], whole["tokens"])
            assert mine["loss"] == pytest.approx(whole["loss"], abs=TOLERANCE)
            for key in {"grad_norm", "grad_norms", "update_norms", "update_rms"} & whole.keys():
                assert mine[key] == pytest.approx(whole[key], rel=1e-3)

    return check


@pytest.fixture
def final_state(stdlib_data: Path) -> Callable[[TrainConfig], dict[str, torch.Tensor]]:
    """`final_state(config)`: every weight and optimizer tensor of the newest checkpoint, by name."""
    vocab_size = json.loads((stdlib_data / "manifest.json").read_text())["vocab_size"]

    def load(config: TrainConfig) -> dict[str, torch.Tensor]:
        model = build_model(config.model, vocab_size, seed=99)
        optimizer = build_optimizer(model, config.optim)
        path = store.latest(config.resolved_run_dir)
        assert path is not None
        with torch.random.fork_rng():
            store.load(path, store.ModelAndOptimizer(model, optimizer))
        names = {param: name for name, param in model.named_parameters()}
        tensors = dict(model.state_dict())
        for param, state in optimizer.state.items():
            tensors |= {f"{names[param]} {key}": value for key, value in state.items()}
        return tensors

    return load


@pytest.fixture
def assert_same_run(final_state: Callable[..., Any]) -> Callable[[TrainConfig, TrainConfig], None]:
    """Two runs ended with the same bits, and recorded the same losses, each exactly once."""

    def check(one: TrainConfig, other: TrainConfig) -> None:
        a, b = final_state(one), final_state(other)
        assert a.keys() == b.keys()
        assert len(a) > 40
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
        assert _losses(one) == _losses(other)

    return check


def _losses(config: TrainConfig) -> list[tuple[Any, ...]]:
    records = [r for r in read_metrics(config.resolved_run_dir) if r["kind"] != "event"]
    return [(r["kind"], r["step"], r["tokens"], r.get("final"), r["loss"]) for r in records]


@pytest.fixture
def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
