"""Checkpoints of a DeepSpeed run go on at another stage, on other ranks, and outside DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from muonlm.bridge.deepspeed import load_checkpoint, save_checkpoint
from muonlm.config.errors import UserError
from muonlm.config.optim import MuonConfig
from muonlm.optim.build import build_optimizer
from muonlm.optim.state import named_state

OnRanks = Callable[..., list[Any]]
BEFORE, AFTER = 2, 2


def save(gpt: SimpleNamespace, on_ranks: OnRanks, world: int, config: dict[str, Any], path: Path) -> list[float]:
    """Train, save, go on: the losses after it was saved."""

    def body(rank: int, size: int) -> list[float]:
        engine = gpt.engine(gpt.config(**config))
        gpt.train(engine, BEFORE)
        save_checkpoint(engine, path)
        return gpt.train(engine, AFTER, begin=BEFORE)

    return on_ranks(body, world)[0]


def go_on(gpt: SimpleNamespace, on_ranks: OnRanks, world: int, config: dict[str, Any], path: Path) -> list[float]:
    def body(rank: int, size: int) -> list[float]:
        engine = gpt.engine(gpt.config(**config))
        gpt.train(engine, 1, begin=17)  # so that neither weights nor state are those of a new engine
        load_checkpoint(engine, path)
        return gpt.train(engine, AFTER, begin=BEFORE)

    return on_ranks(body, world)[0]


def test_from_stage_2_to_stage_3_and_to_one_process(gpt: SimpleNamespace, on_ranks: OnRanks, tmp_path: Path) -> None:
    losses = save(gpt, on_ranks, 2, {"stage": 2, "zero": {"round_robin_gradients": True}}, tmp_path / "saved")
    assert go_on(gpt, on_ranks, 2, {"stage": 3}, tmp_path / "saved") == pytest.approx(losses, abs=1e-6)
    model = gpt.new_model()
    optimizer = build_optimizer(model, MuonConfig.model_validate(gpt.muon))
    dcp.load({"model": model.state_dict(), "optimizer": named_state(optimizer)}, checkpoint_id=tmp_path / "saved")
    ours = []
    for step in range(BEFORE, BEFORE + AFTER):
        loss = gpt.loss_of(model, gpt.tokens(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.append(loss.item())
    assert ours == pytest.approx(losses, abs=1e-6)


STAGE_3 = {"stage": 3, "zero": {"sub_group_size": 2000}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "saved", "target", "loaded"),
    [
        (2, {"stage": 1}, 4, {"stage": 3}),
        (4, STAGE_3, 1, {"stage": 1}),
        (4, {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}}, 2, STAGE_3),
        (1, {"stage": 3}, 4, {"stage": 2}),
    ],
)
def test_from_anywhere_to_anywhere(
    world: int, saved: Any, target: int, loaded: Any, gpt: SimpleNamespace, on_ranks: OnRanks, tmp_path: Path
) -> None:
    losses = save(gpt, on_ranks, world, saved, tmp_path / "saved")
    assert go_on(gpt, on_ranks, target, loaded, tmp_path / "saved") == pytest.approx(losses, abs=1e-6)


@pytest.mark.slow
def test_bfloat16_masters_are_kept(gpt: SimpleNamespace, on_ranks: OnRanks, tmp_path: Path) -> None:
    """What is saved is the fp32 master: a model restored from the bfloat16 copy would go another way."""
    bf16 = {"bf16": {"enabled": True}}
    losses = save(
        gpt, on_ranks, 2, {"stage": 1, "data_types": {"grad_accum_dtype": "fp32"}, **bf16}, tmp_path / "saved"
    )
    for stage in (2, 3):
        there = go_on(gpt, on_ranks, 2, {"stage": stage, **bf16}, tmp_path / "saved")
        assert there == pytest.approx(losses, abs=2e-3)
        assert there[0] == losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_checkpoints_go_on_bit_for_bit(
    stage: int, gpt: SimpleNamespace, on_ranks: OnRanks, tmp_path: Path
) -> None:
    """Momentum in bfloat16 among them, which torch would load in fp32."""
    muon = {**gpt.muon, "momentum_dtype": "bfloat16"}

    def first(rank: int, world: int) -> Any:
        engine = gpt.engine(gpt.config(stage), muon=muon)
        gpt.train(engine, BEFORE)
        engine.save_checkpoint(str(tmp_path))
        return gpt.train(engine, AFTER, begin=BEFORE)

    def second(rank: int, world: int) -> Any:
        engine = gpt.engine(gpt.config(stage), muon=muon)
        engine.load_checkpoint(str(tmp_path))
        losses = gpt.train(engine, AFTER, begin=BEFORE)
        state = [bound.state["momentum_buffer"] for bound in engine.optimizer.optimizer.partitions if bound.muon]
        return losses, {t.dtype for t in state}

    expected = on_ranks(first, 2)[0]
    losses, dtypes = on_ranks(second, 2)[0]
    assert losses == expected
    assert dtypes == {torch.bfloat16}


@pytest.mark.slow
def test_frozen_parameters_and_buffers(gpt: SimpleNamespace, on_ranks: OnRanks, tmp_path: Path) -> None:
    """They are saved and restored where they are whole, and refused where they are not, rather than left out."""

    def engine(stage: int) -> Any:
        model = gpt.new_model()
        model.register_buffer("count", torch.zeros(3))
        model.get_input_embeddings().weight.requires_grad_(False)
        return gpt.engine(gpt.config(stage), model=model)

    def body(rank: int, world: int) -> None:
        saved, loaded = engine(2), engine(1)
        saved.module.count.fill_(7)
        saved.module.get_input_embeddings().weight.data.fill_(0.5)
        save_checkpoint(saved, tmp_path / "saved")
        load_checkpoint(loaded, tmp_path / "saved")
        assert loaded.module.count.eq(7).all()
        assert loaded.module.get_input_embeddings().weight.eq(0.5).all()
        with pytest.raises(UserError, match="frozen"):
            save_checkpoint(engine(3), tmp_path / "other")

    on_ranks(body, 1)


def test_another_model_is_refused(gpt: SimpleNamespace, on_ranks: OnRanks, tmp_path: Path) -> None:
    """With more parameters than the checkpoint has, or with fewer."""

    def body(rank: int, world: int) -> None:
        large, small = (gpt.engine(gpt.config(1), model=gpt.new_model(num_layers=n)) for n in (3, 2))
        save_checkpoint(large, tmp_path / "large")
        save_checkpoint(small, tmp_path / "small")
        for engine, name in ((large, "small"), (small, "large")):
            with pytest.raises(UserError, match=r"layers\.2.*it must be of the same model"):
                load_checkpoint(engine, tmp_path / name)

    on_ranks(body, 1)


def test_what_cannot_be_written_or_read_is_told(gpt: SimpleNamespace, on_ranks: OnRanks, tmp_path: Path) -> None:
    def body(rank: int, world: int) -> None:
        engine = gpt.engine(gpt.config(2))
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"could not be written to .*file"):
            save_checkpoint(engine, tmp_path / "file")
        save_checkpoint(engine, tmp_path / "saved")
        (tmp_path / "saved" / ".metadata").write_bytes(b"no pickle")
        with pytest.raises(UserError, match="cannot be loaded"):
            load_checkpoint(engine, tmp_path / "saved")

    on_ranks(body, 1)
