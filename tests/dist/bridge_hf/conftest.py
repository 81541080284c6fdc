"""A tiny run of `muonlm train`, and what the Trainer and accelerate need to train the same."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

# Read once, when they are first imported: no test asks a server for anything.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

BATCH = 4
GRAD_CLIP = 0.5  # is less than the norm of the first gradients of the AdamW groups
# Iterates in fp32, so that what differs is the order in which sums over ranks are rounded.
MUON: dict[str, Any] = {"lr": 0.01, "aux": {"lr": 0.005}, "newton_schulz": {"dtype": "float32"}}


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """Before ranks are forked, so that they need not import them each."""
    for module in ("accelerate", "transformers.trainer", "transformers.models.qwen3.modeling_qwen3"):
        importlib.import_module(module)


@pytest.fixture
def tiny(stdlib_data: Path, tmp_path: Path) -> SimpleNamespace:
    """The run: `config`; `model()`, a new Qwen3 of its initial weights; `samples(steps)`; `batch` and `grad_clip`."""
    from muonlm.bridge.transformers import to_qwen3
    from muonlm.config.schema import TrainConfig
    from muonlm.data.dataset import open_split
    from muonlm.data.loader import BatchOrder
    from muonlm.model.build import build_model

    raw: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(tmp_path / "run"),
        "data": {"path": str(stdlib_data), "seq_len": 24},
        "model": {
            "kind": "gpt",
            "num_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        "optim": {"kind": "muon", **MUON},
        "schedule": {"warmup_steps": 0, "decay_fraction": 0.0},
        "loop": {"steps": 20, "batch_size": BATCH, "threads": 1, "precision": "float32", "device": "cpu"},
        "track": {"console": False},
    }
    raw["loop"]["grad_clip"] = GRAD_CLIP
    config = TrainConfig.model_validate(raw)
    data = open_split(stdlib_data, "train", 24, "never")
    order = BatchOrder(data.num_sequences, config.seed)

    def samples(steps: int) -> list[dict[str, torch.Tensor]]:
        """What the run sees, in order; transformers predicts each id but the first from those before."""
        ids = torch.from_numpy(data.sequences(order.indices(0, BATCH * steps)))
        return [{"input_ids": row, "labels": row} for row in ids.long()]

    def model() -> torch.nn.Module:
        return to_qwen3(build_model(config.model, data.vocab_size, config.seed)).train()

    return SimpleNamespace(config=config, model=model, samples=samples, batch=BATCH, grad_clip=GRAD_CLIP)


def _own_loop(config: Any) -> dict[str, Any]:
    from muonlm.dist import process
    from muonlm.train.setup import build
    from muonlm.train.step import take_step

    parts = build(config, process.start(config.dist, "cpu"), {})
    results = [take_step(parts, i, i * BATCH, measure=False, stop=False) for i in range(config.num_steps)]
    return {"losses": [result.loss for result in results], "state": state_of(parts.model, parts.optimizer)}


@pytest.fixture
def own_loop(tiny: SimpleNamespace, run_ranks: Callable[..., list[Any]]) -> Callable[[], dict[str, Any]]:
    """`own_loop()`: losses, weights and momenta of the run on one process of `muonlm train`."""
    return lambda: run_ranks(lambda rank, size: _own_loop(tiny.config), 1, join=False)[0]


def state_of(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """Weights and optimizer state by parameter name, whole, as numpy arrays. Called by all ranks."""
    from muonlm.optim.state import named_state

    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    module = model.module if isinstance(model, DistributedDataParallel) else model
    named = {"weights": dict(module.named_parameters()), **named_state(getattr(optimizer, "muon", optimizer))}
    return {
        f"{name}.{key}": (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone().numpy()
        for name, tensors in named.items()
        for key, t in tensors.items()
    }


@pytest.fixture
def hf() -> SimpleNamespace:
    """`state_of(model, optimizer)`, `settings` of Muon, and `shard_on_cpu()`."""
    return SimpleNamespace(state_of=state_of, settings=MUON, shard_on_cpu=shard_on_cpu)


def shard_on_cpu() -> None:
    """Make accelerate, which shards on accelerators alone, take gloo ranks for such."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
