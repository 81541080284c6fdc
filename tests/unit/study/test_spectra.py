"""Spectral measures on matrices with known spectra, and on checkpoints written by the real store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from muonlm.checkpoint.store import ModelAndOptimizer, save
from muonlm.config.errors import UserError
from muonlm.config.load import dump_toml
from muonlm.config.schema import AdamWConfig, DataConfig, GPTConfig, LoopConfig, MuonConfig, TrainConfig
from muonlm.model.build import build_model
from muonlm.optim.build import build_optimizer
from muonlm.study import spectra

MODEL = GPTConfig(num_layers=2, hidden_size=16, intermediate_size=32, num_heads=2)


def test_flat_spectrum_has_full_rank() -> None:
    assert spectra.effective_rank(torch.full((8,), 3.0)) == pytest.approx(1.0)
    assert spectra.stable_rank(torch.full((8,), 3.0)) == pytest.approx(8.0)


def test_rank_one() -> None:
    values = torch.tensor([5.0, 0, 0, 0])
    assert spectra.effective_rank(values) == pytest.approx(1 / 4)
    assert spectra.stable_rank(values) == pytest.approx(1.0)


def test_squares_and_not_singular_values_are_weighted() -> None:
    """s = (2, 1): q = (0.8, 0.2), entropy 0.500402, exp 1.649385, over 2."""
    assert spectra.effective_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.649385 / 2, rel=1e-6)
    assert spectra.stable_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.25)


def make_run(path: Path, optim: MuonConfig | AdamWConfig, update_rank: int) -> Path:
    """A run directory whose hidden matrices all got an update of flat spectrum and the given rank."""
    config = TrainConfig(
        name="x", seed=7, data=DataConfig(path="none"), model=MODEL, optim=optim, loop=LoopConfig(steps=20)
    )
    path.mkdir()
    (path / "config.toml").write_text(dump_toml(config))
    model = build_model(config.model, 32, config.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                rows, columns = weight.shape
                q = torch.linalg.qr(torch.randn(rows, min(rows, columns)))[0][:, :update_rank]
                r = torch.linalg.qr(torch.randn(columns, min(rows, columns)))[0][:, :update_rank]
                weight += q @ r.T
    save(path, 1, ModelAndOptimizer(model, build_optimizer(model, optim)), {}, keep=1)
    return path


def test_the_final_checkpoint_is_measured_and_its_initialisation_taken_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adamw = make_run(tmp_path / "adamw", AdamWConfig(), update_rank=2)
    muon = make_run(tmp_path / "muon", MuonConfig(), update_rank=16)
    result = spectra.run([adamw, muon])
    first, second = result["runs"]
    assert set(first["kinds"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for kind in first["kinds"]:
        assert first["kinds"][kind]["update_effective_rank"] == pytest.approx(2 / 16, rel=1e-4)
        assert second["kinds"][kind]["update_effective_rank"] == pytest.approx(1.0, rel=1e-4)
        assert second["kinds"][kind]["update_stable_rank"] == pytest.approx(16, rel=1e-4)
    assert result["verdict"]["reproduced"] is True
    assert "in all 7 kinds" in result["verdict"]["text"]
    assert spectra.run([muon, muon])["verdict"]["reproduced"] is None
    assert spectra.table(result).row_count == 7


def test_the_verdict_is_false_when_muon_is_not_flatter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adamw = make_run(tmp_path / "adamw", AdamWConfig(), update_rank=16)
    muon = make_run(tmp_path / "muon", MuonConfig(), update_rank=2)
    verdict = spectra.run([adamw, muon])["verdict"]
    assert verdict["reproduced"] is False
    assert "not higher in any of 7" in verdict["text"]


def test_a_run_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.toml"):
        spectra.run([tmp_path])
    path = make_run(tmp_path / "run", MuonConfig(), update_rank=2)
    next((path / "checkpoints").glob("step_*/complete.json")).unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        spectra.run([path])
