"""The Trainer of transformers with our Muon trains what `muonlm train` trains, saves it, and resumes it."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from muonlm.config.errors import UserError

# A unit in the last place of the losses, which begin at 6.3, is 5e-7.
TOLERANCE = 1e-5


def arguments(folder: Any, steps: int, batch: int, **changes: Any) -> Any:
    from transformers import TrainingArguments

    fixed = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**fixed, **changes})


def trained(tiny: Any, hf: Any, folder: Any, size: int, *, resume: Any = None, **changes: Any) -> dict[str, Any]:
    """Losses and the final state of a Trainer on the batches of the run."""
    from transformers import PrinterCallback, Trainer

    from muonlm.bridge.trainer import muon_for_trainer

    if size == 1:  # as without torchrun
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
    steps = tiny.config.num_steps
    args = arguments(folder, steps, tiny.batch // size, **changes)
    if args.fsdp:
        hf.shard_on_cpu()
    muon: Any = muon_for_trainer(args, grad_clip=tiny.grad_clip, **hf.settings)
    trainer: Any = Trainer(
        model=tiny.model(),
        args=args,
        train_dataset=tiny.samples(steps),
        optimizer_cls_and_kwargs=muon,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "losses": [log["loss"] for log in logs],
        "rates": [log["learning_rate"] for log in logs],
        "is_sharded": any(isinstance(param, DTensor) for param in trainer.model.parameters()),
        "kind": trainer.accelerator.distributed_type.value,
        "state": hf.state_of(trainer.model, trainer.optimizer),
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("size", [1, 2])
def test_same_as_muonlm_train(run_ranks, tiny, hf, own_loop, tmp_path, size) -> None:
    own = own_loop()
    for result in run_ranks(lambda rank, size: trained(tiny, hf, tmp_path, size), size, join=False):
        assert result["kind"] == ("NO" if size == 1 else "MULTI_CPU")
        difference = np.abs(np.subtract(result["losses"], own["losses"]))
        print("largest difference of a loss", difference.max())
        assert difference.shape == (20,)
        assert difference.max() < TOLERANCE
        assert_same(result["state"], own["state"], 1e-4)
        assert set(result["rates"]) == {hf.settings["lr"]}


SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
}


@pytest.mark.slow
def test_same_when_sharded(run_ranks, tiny, hf, own_loop, tmp_path) -> None:
    """accelerate replaces the parameters after it was given the optimizer."""
    own = own_loop()
    for result in run_ranks(lambda rank, size: trained(tiny, hf, tmp_path, size, **SHARDED), 2, join=False):
        assert result["kind"] == "FSDP"
        assert result["is_sharded"]
        difference = np.abs(np.subtract(result["losses"], own["losses"]))
        print("largest difference of a loss", difference.max())
        assert difference.shape == (20,)
        assert difference.max() < TOLERANCE
        assert_same(result["state"], own["state"], 1e-4)


@pytest.mark.parametrize(
    "way",
    [
        "ddp",
        pytest.param("FULL_STATE_DICT", marks=pytest.mark.slow),
        pytest.param("SHARDED_STATE_DICT", marks=pytest.mark.slow),
    ],
)
def test_resumes_bit_for_bit(run_ranks, tiny, hf, tmp_path, way) -> None:
    """With a schedule, from a checkpoint of the Trainer's own: momentum, AdamW's moments, steps and learning rates."""
    changes: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 4, "save_strategy": "steps"}
    changes |= {"save_steps": 8, "logging_steps": 1}
    if way != "ddp":
        changes |= {"fsdp": True, "fsdp_config": {**SHARDED["fsdp_config"], "state_dict_type": way}}

    def run(rank: int, size: int, resume: str | None) -> dict[str, Any]:
        return trained(tiny, hf, tmp_path, size, resume=resume, **changes)

    whole = run_ranks(run, 2, None, join=False, timeout_s=120)[0]
    assert len(set(whole["rates"])) > 10
    resumed = run_ranks(run, 2, str(tmp_path / "checkpoint-8"), join=False, timeout_s=120)[0]
    # Those before are read from the checkpoint.
    assert len(resumed["losses"]) == 20
    assert resumed["losses"] == whole["losses"]
    assert resumed["rates"] == whole["rates"]
    assert_same(resumed["state"], whole["state"], 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=0.0 and, for AdamW groups, muon_for_trainer\(..., grad_clip=1.0\)"),
        ({"learning_rate": 1e-3, "weight_decay": 0.1}, r"(?s)learning_rate=0.001 would be ignored.*weight_decay=0.1"),
        ({"optim": "sgd"}, "sgd would be ignored"),
    ],
)
def test_refuses_arguments_without_effect(tmp_path, changes, message) -> None:
    from muonlm.bridge.trainer import muon_for_trainer

    with pytest.raises(UserError, match=message):
        muon_for_trainer(arguments(tmp_path, 1, 1, **changes), lr=1e-3)


def test_refuses_options_that_do_not_exist(tmp_path) -> None:
    from muonlm.bridge.trainer import muon_for_trainer

    with pytest.raises(UserError, match="learning_rate"):
        muon_for_trainer(arguments(tmp_path, 1, 1), learning_rate=1e-3)


@pytest.mark.parametrize("grad_clip", [-1.0, "1", float("nan")])
def test_refuses_a_clip_that_is_none(tmp_path, grad_clip) -> None:
    """A negative one would turn gradients around."""
    from muonlm.bridge.accelerate import DeferredMuon
    from muonlm.bridge.trainer import muon_for_trainer
    from muonlm.config.optim import MuonConfig
    from muonlm.optim.muon import Muon

    with pytest.raises(UserError, match=r"grad_clip=.*it must be a number, and not negative"):
        muon_for_trainer(arguments(tmp_path, 1, 1), grad_clip=grad_clip)
    model = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match="must be a number"):
        DeferredMuon(model, MuonConfig(), grad_clip=grad_clip)
    with pytest.raises(UserError, match="must be a number"):
        Muon([("weight", model.weight)]).clip_gradients(grad_clip)


def test_refuses_a_trainer_that_takes_no_factory(tmp_path, monkeypatch) -> None:
    from muonlm.bridge.trainer import muon_for_trainer

    args = arguments(tmp_path, 1, 1)
    monkeypatch.setitem(sys.modules, "transformers.trainer_optimizer", None)
    with pytest.raises(UserError, match="classes of optimizers only"):
        muon_for_trainer(args, lr=1e-3)


def test_refuses_sharding_that_would_not_happen(run_ranks, tiny, hf, tmp_path) -> None:
    """With use_cpu=True the Trainer takes fsdp=True and trains with DistributedDataParallel."""
    hf.shard_on_cpu = lambda: None
    with pytest.raises(UserError, match="FSDP was asked for and has no effect"):
        run_ranks(lambda rank, size: trained(tiny, hf, tmp_path, size, **SHARDED), 2, join=False)


def test_a_schedules_least_learning_rate_is_that_of_muon(run_ranks, tiny, hf, tmp_path) -> None:
    """transformers divides it by the optimizer's default learning rate."""
    changes = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.004}}
    [result] = run_ranks(lambda rank, size: trained(tiny, hf, tmp_path, 1, **changes), 1, join=False)
    # Logged before the step: the last is one step above the floor.
    assert result["rates"][0] == 0.01
    assert 0.004 < result["rates"][-1] < 0.0041
