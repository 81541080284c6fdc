"""Runs of untrained models whose weights are far from their initial values, and their exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muonlm.checkpoint import store
from muonlm.cli.main import main
from muonlm.config.load import dump_toml
from muonlm.config.schema import TrainConfig
from muonlm.model.build import build_model
from muonlm.model.gpt import GPT
from muonlm.optim.build import build_optimizer

DENSE = {"kind": "gpt", "num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
EXPERTS = {**DENSE, "kind": "moe", "num_experts": 4, "expert_size": 24, "experts_per_token": 2}
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "tied, grouped queries, relu2": {
        **DENSE, "tie_embeddings": True, "num_kv_heads": 2, "head_dim": 10, "activation": "relu2", "rope_theta": 1e5
    },
    "padded vocabulary, other norm": {**DENSE, "vocab_size": 600, "rms_norm_eps": 1e-3},
    "sigmoid": {**EXPERTS, "num_layers": 3, "num_shared_experts": 2, "routed_scale": 2.5, "rope_theta": 5e4},
    "sigmoid, nothing shared": {**EXPERTS, "num_shared_experts": 0, "normalize_weights": False, "num_dense_layers": 0},
    "softmax": {**EXPERTS, "router": "softmax", "num_shared_experts": 0, "balance": "loss", "num_layers": 3},
    "softmax, as it is, tied": {
        **EXPERTS, "router": "softmax", "num_shared_experts": 0, "balance": "none", "normalize_weights": False,
        "tie_embeddings": True, "activation": "relu2", "num_dense_layers": 0,
    },
}  # fmt: skip


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def raw_model(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One of the models that can be exported, as its table."""
    return dict(request.param)


@pytest.fixture
def make_config(stdlib_data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`make_config(table)`: the config of a run with that [model] table, in a directory of its own."""

    def make(model: dict[str, Any]) -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "name": "tiny",
                "run_dir": str(tmp_path / "run"),
                "data": {"path": str(stdlib_data), "seq_len": 32},
                "model": model,
                "loop": {"steps": 20, "batch_size": 4},
            }
        )

    return make


@pytest.fixture
def make_model(stdlib_data: Path) -> Callable[..., GPT]:
    """`make_model(config)`: a model of a run whose norms are not 1, routers' biases not 0, and logits not small."""
    data_vocab = json.loads((stdlib_data / "manifest.json").read_text())["vocab_size"]

    def make(config: TrainConfig) -> GPT:
        model = build_model(config.model, config.model.vocab_size or data_vocab, seed=3)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
        return model

    return make


@pytest.fixture
def save_run(make_config: Callable[..., TrainConfig], make_model: Callable[..., GPT]) -> Callable[..., GPT]:
    """`save_run(table, step=7)`: the run directory of that model with one checkpoint; returns the model."""

    def save(table: dict[str, Any], step: int = 7) -> GPT:
        config = make_config(table)
        model = make_model(config)
        run = Path(config.resolved_run_dir)
        run.mkdir(exist_ok=True)
        (run / "config.toml").write_text(dump_toml(config))
        store.save(
            run, step, store.ModelAndOptimizer(model, build_optimizer(model, config.optim)), {"step": step}, keep=9
        )
        return model

    return save


@pytest.fixture
def export(save_run: Callable[..., GPT], tmp_path: Path) -> Callable[..., tuple[GPT, Path]]:
    """`export(table, "--dtype", "bfloat16")`: such a model and the directory that it was exported to."""

    def run(table: dict[str, Any], *arguments: str) -> tuple[GPT, Path]:
        model = save_run(table)
        assert main(["export", str(tmp_path / "run"), "--to", "hf", str(tmp_path / "hf"), *arguments]) == 0
        return model, tmp_path / "hf"

    return run
