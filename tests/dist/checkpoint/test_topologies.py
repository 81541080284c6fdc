"""A checkpoint is of the model, not of the ranks: saved under one way of sharding, it restores under any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from muonlm.checkpoint import store
from muonlm.config.schema import TrainConfig
from muonlm.dist import process
from muonlm.train.setup import Parts, build
from muonlm.train.step import take_step

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1": (1, {}),
    "ddp 2": (2, {}),
    "zero-1 2": (2, {"zero": 1}),
    "zero-2 3": (3, {"zero": 2}),
    "fsdp 2": (2, {"zero": 3}),
    "fsdp 3": (3, {"zero": 3}),
    "hsdp 2x2": (4, {"zero": 3, "replicas": 2}),
    "tp 2": (2, {"tensor_parallel": 2}),
    "tp x fsdp 2x2": (4, {"zero": 3, "tensor_parallel": 2}),
}
TRANSITIONS = [
    ("1", "fsdp 3"),
    ("1", "zero-2 3"),
    ("1", "tp x fsdp 2x2"),
    ("ddp 2", "fsdp 2"),
    ("ddp 2", "hsdp 2x2"),
    ("zero-1 2", "fsdp 3"),
    ("zero-1 2", "1"),
    ("zero-2 3", "zero-1 2"),
    ("zero-2 3", "tp 2"),
    ("fsdp 2", "1"),
    ("fsdp 2", "zero-1 2"),
    ("fsdp 2", "fsdp 2"),
    ("fsdp 3", "fsdp 2"),
    ("fsdp 3", "tp x fsdp 2x2"),
    ("hsdp 2x2", "tp 2"),
    ("hsdp 2x2", "zero-2 3"),
    ("tp 2", "ddp 2"),
    ("tp 2", "hsdp 2x2"),
    ("tp x fsdp 2x2", "1"),
    ("tp x fsdp 2x2", "fsdp 3"),
]
BATCH = 12
_SAVED: dict[str, Path] = {}


def _go(parts: Parts, begin: int, folder: Path) -> None:
    """Three steps, then a checkpoint in `folder`."""
    for step in range(begin, begin + 3):
        take_step(parts, step, step * BATCH, measure=False, stop=False)
    store.save(folder, begin + 3, parts.contents, {}, keep=1)


@pytest.fixture
def config_of(stdlib_data: Path) -> Callable[[dict[str, int]], TrainConfig]:
    """`config_of(dist)`: a tiny model, of shapes that 3 ranks cannot cut evenly."""

    def make(dist: dict[str, int]) -> TrainConfig:
        raw: dict[str, Any] = {
            "name": "tiny",
            "data": {"path": str(stdlib_data), "seq_len": 16},
            "model": {
                "kind": "gpt",
                "num_layers": 1, "hidden_size": 20, "intermediate_size": 34, "num_heads": 4, "num_kv_heads": 2,
                "head_dim": 6, "tie_embeddings": True,
            },
            "optim": {"kind": "muon", "newton_schulz": {"dtype": "float32"}},
            "schedule": {"warmup_steps": 2},
            "loop": {"steps": 20, "batch_size": BATCH, "threads": 1, "precision": "float32", "device": "cpu"},
            "dist": dist,
        }  # fmt: skip
        return TrainConfig.model_validate(raw)

    return make


@pytest.fixture
def saved(run_ranks, config_of, tmp_path_factory) -> Callable[[str], Path]:
    """`saved(layout)`: a folder with the checkpoints of step 3, `begin`, and, not interrupted, of step 6, `end`."""

    def run(layout: str) -> Path:
        if layout not in _SAVED:
            size, dist = LAYOUTS[layout]
            folder = tmp_path_factory.mktemp("saved")

            def one_rank(rank: int, world_size: int) -> None:
                config = config_of(dist)
                parts = build(config, process.start(config.dist, "cpu"), {})
                _go(parts, 0, folder / "begin")
                _go(parts, 3, folder / "end")

            run_ranks(one_rank, size, join=False)
            _SAVED[layout] = folder
        return _SAVED[layout]

    return run


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, read without any of our code."""
    path = store.latest(folder)
    assert path is not None
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(kind.size, dtype=kind.properties.dtype) for key, kind in stored.items()}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


@pytest.mark.parametrize(("one", "other"), TRANSITIONS)
def test_a_run_goes_on_under_another_way_of_sharding(run_ranks, config_of, saved, tmp_path, one, other) -> None:
    folder = saved(one)
    size, dist = LAYOUTS[other]

    def one_rank(rank: int, world_size: int) -> None:
        config = config_of(dist)
        parts = build(config, process.start(config.dist, "cpu"), {})
        for group in parts.optimizer.param_groups:  # nothing that was there before may count
            for param in group["params"]:
                for state in parts.optimizer.state[param].values():
                    state.fill_(7.0)
        store.load(folder / "begin" / "checkpoints" / "step_00000003", parts.contents)
        store.save(tmp_path / "again", 3, parts.contents, {}, keep=1)
        _go(parts, 3, tmp_path / "end")

    run_ranks(one_rank, size, join=False)
    before, again = _tensors(folder / "begin"), _tensors(tmp_path / "again")
    assert "optimizer.model.layers.0.mlp.up_proj.weight.momentum_buffer" in before
    assert "optimizer.model.embed_tokens.weight.exp_avg_sq" in before
    assert before.keys() == again.keys()
    assert [key for key in before if not torch.equal(before[key], again[key])] == []
    straight, ours = _tensors(folder / "end"), _tensors(tmp_path / "end")
    worst = {"model": 0.0, "optimizer": 0.0, "random": 0.0}
    for key, expected in straight.items():
        difference = (ours[key].double() - expected.double()).norm() / expected.double().norm()
        kind = key.partition(".")[0]
        worst[kind] = max(worst[kind], float(difference))
    print(one, other, worst)
    # Weights differ as the gradients of two ways of adding up do; moments, relative to themselves, by a few times that.
    assert worst["model"] <= (0 if one == other else 1e-6)
    assert worst["optimizer"] <= (0 if one == other else 4e-6)
    assert worst["random"] == 0
