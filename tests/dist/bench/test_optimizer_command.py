"""`muonlm bench optimizer` on ranks that it starts itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from muonlm.bench import optimizers, steps
from muonlm.bench.launch import on_ranks
from muonlm.cli.main import main
from muonlm.config.errors import UserError
from muonlm.dist.process import World

QUICK = ["bench", "optimizer", "--quick", "--dtype", "float32", "--device", "cpu", "--longest-step", "3"]


def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What the command prints, and its JSON."""
    path = tmp_path / "result.json"
    assert main([*QUICK, "--json", str(path), *options]) == 0
    return capfd.readouterr().out, json.loads(path.read_text())


def test_counts_equal_the_formula_and_the_bars_hold(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, result = run(capfd, tmp_path)
    assert result["world"] == {"ranks": 2, "backend": "gloo", "layout": "fsdp", "replicas": 1}
    ours, plan = result["contenders"][0], result["plan"]
    assert ours["name"] == "muonlm Muon, float32"
    assert ours["bytes_mean"] == pytest.approx(plan["formula_bytes"], rel=0.05)
    assert ours["collectives"] <= plan["most_collectives"]
    assert len(ours["seconds_of_rounds"]) == result["rounds"] == 3
    peers = {row["name"]: row for row in result["contenders"]}
    theirs = peers["torch.optim.Muon, float32 iterates"]
    assert theirs["skipped"] is None
    assert theirs["collectives"] > 10 * ours["collectives"]
    assert peers["torch.optim.AdamW, fused"]["collectives"] == 0
    assert "one step" in text
    assert f"Ours sends {ours['bytes_mean'] / 1e6:.3f} MB a rank and step where the formula says" in text


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [("replicated", 2), ("replicated", 1), ("tp", 2), pytest.param("hsdp", 4, marks=pytest.mark.slow)],
)
def test_other_layouts(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, ranks: int
) -> None:
    every = optimizers.contenders(torch.float32, 2**27)
    monkeypatch.setattr(steps, "contenders", lambda *_: [every[0], every[-1]])
    text, result = run(capfd, tmp_path, "--layout", layout, "--ranks", str(ranks), "--tokens", "32")
    ours = result["contenders"][0]
    # A few matrices on two ranks are not in balance; what a broadcast pads is the rest of the busiest rank's share.
    slack = 1.05 * (result["plan"]["imbalance"] if layout == "replicated" else 1)
    assert ours["bytes_mean"] <= slack * result["plan"]["formula_bytes"] + 200
    assert result["model_seconds"] > 0
    assert "of the step" in text


def test_a_peer_that_is_missing_slow_or_broken_is_left_out_with_the_reason(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(params: Any, grid: Any) -> Any:
        raise ValueError("does not work\nat all")

    monkeypatch.setattr(optimizers, "_adamw", broken)
    monkeypatch.setitem(sys.modules, "dion", None)
    monkeypatch.setattr(steps, "matmul_tflops", lambda dtype, device: 1e-9 if dtype == torch.bfloat16 else 1.0)
    text, result = run(capfd, tmp_path)
    reasons = {row["name"]: row["skipped"] for row in result["contenders"]}
    assert reasons["torch.optim.AdamW, fused"] == "failed: ValueError: does not work"
    assert reasons["dion Muon, float32 iterates"].startswith("not installed")
    assert "bfloat16 products run at 0.0 GFLOP/s here" in reasons["torch.optim.Muon, as it is"]
    assert "torch.optim.AdamW, fused: left out, failed" in text


def test_ours_must_take_part(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--longest-step", "1e-9"]) == 2
    assert "muonlm Muon, float32: a step would take" in capfd.readouterr().err


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "optimizer", "--layout", "hsdp", "--ranks", "2"]) == 2
    assert "layout hsdp needs an even number of ranks, at least 4, not 2" in capsys.readouterr().err
    assert main(["bench", "optimizer", "--model", "llama-7b", "--tokens", "5"]) == 2
    for wrong in (["--ranks", "0"], ["--layout", "zero9"], ["--model", "none"], ["--json", "/no/such/folder/x"]):
        with pytest.raises(SystemExit) as error:
            main(["bench", "optimizer", *wrong])
        assert error.value.code == 2
        assert wrong[0] in capsys.readouterr().err


def _work(world: World, settings: Any) -> Any:
    if settings == world.rank:
        raise UserError("this rank will not")
    if settings == "crash":
        raise RuntimeError("broken")
    return world.size, torch.get_num_threads()


def test_what_ranks_return_and_raise() -> None:
    assert on_ranks(_work, None, 2, "cpu", 1) == (2, 1)
    with pytest.raises(UserError, match="this rank will not"):
        on_ranks(_work, 1, 2, "cpu", 1)
    with pytest.raises(Exception, match="broken"):
        on_ranks(_work, "crash", 2, "cpu", 1)
