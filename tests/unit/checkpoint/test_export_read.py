"""Single tensors of a checkpoint are read as they were saved, and what cannot be read is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from muonlm.checkpoint import store
from muonlm.checkpoint.read import StoredModel, find
from muonlm.config.errors import UserError
from muonlm.config.schema import AdamWConfig, GPTConfig
from muonlm.model.build import build_model
from muonlm.model.gpt import GPT
from muonlm.optim.build import build_optimizer

SHAPE = {"num_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}


@pytest.fixture
def model() -> GPT:
    """A small model."""
    return build_model(GPTConfig.model_validate(SHAPE), 50, seed=0)


@pytest.fixture
def run(model: GPT, tmp_path: Path) -> Path:
    """A run directory with the checkpoints of steps 3 and 5."""
    for step in (3, 5):
        store.save(tmp_path, step, store.ModelAndOptimizer(model, build_optimizer(model, AdamWConfig())), {}, keep=2)
    return tmp_path


def test_tensors_are_those_that_were_saved(model: GPT, run: Path) -> None:
    stored = StoredModel(find(run))
    assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in model.state_dict().items())


def test_parts_of_ranks_are_put_together(model: GPT, tmp_path: Path, run_ranks: Callable[..., list[None]]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def one_rank(rank: int, world_size: int) -> None:
        sharded = fully_shard(build_model(GPTConfig.model_validate(SHAPE), 50, 0), mesh=init_device_mesh("cpu", (3,)))
        store.save(tmp_path, 1, store.ModelAndOptimizer(sharded, build_optimizer(sharded, AdamWConfig())), {}, keep=2)

    run_ranks(one_rank, 3)
    stored = StoredModel(find(tmp_path))
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in model.state_dict().items())


def test_which_checkpoint(run: Path) -> None:
    assert find(run) == run / "checkpoints" / "step_00000005"
    assert find(run, 3) == run / "checkpoints" / "step_00000003"
    assert find(run / "checkpoints" / "step_00000003") == run / "checkpoints" / "step_00000003"


@pytest.mark.parametrize(
    ("place", "step", "message"),
    [
        ("", 4, "no checkpoint of step 4: there are 3, 5"),
        ("nowhere", None, "no such directory"),
        ("checkpoints", None, "no complete checkpoint"),
        ("checkpoints/step_00000003", 5, "checkpoint of another step"),
    ],
)
def test_no_such_checkpoint(run: Path, place: str, step: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(run / place, step)


def test_damaged_checkpoint_is_not_exported(run: Path) -> None:
    file = next((run / "checkpoints" / "step_00000003").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    for wanted in ((run, 3), (file.parent, None)):
        with pytest.raises(UserError, match="is damaged"):
            find(*wanted)
