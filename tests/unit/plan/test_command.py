"""The command: what it prints and writes, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muonlm.cli.main import main
from muonlm.plan.hardware import DEVICES
from muonlm.plan.table import scaled

ON = ["plan", "gpt-124m", "--vocab-size", "50304"]


def test_tables_and_json_say_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = ["dist.zero=3", "--nodes", "2", "--gpus-per-node", "8", "--gpu", "a100-40gb", "--json", str(file)]
    assert main([*ON, *words]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert printed.startswith("gpt-124m on 16 x a100-40gb in 2 nodes: 16 shard, FSDP2\n")
    assert max(map(len, printed.splitlines())) <= 120
    assert (found["schema"], found["world_size"], found["engine"]) == ("muonlm-plan/1", 16, "fsdp")
    memory, owners = found["memory_bytes"], found["owners"]
    assert memory["peak"] == max(memory["phases"].values())
    for value in (memory["weights"], memory["optimizer_state"], *memory["phases"].values()):
        assert scaled(value, "B") in printed
    assert f"largest / mean load {owners['imbalance']:.3f}" in printed
    for transfer in found["sent_in_a_step"]:
        assert scaled(transfer["between_nodes_bytes"], "B") in printed
        assert f"{transfer['phase']}: {transfer['what']}" in printed
    assert f"{found['predicted_s']['muon_share']:.2%}" in printed
    assert f"largest that fits: {found['largest_micro_batch']}" in printed
    assert "Predicted time of a step, not measured" in printed


def test_a_run_that_cannot_fit_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "1", "--gpus-per-node", "8", "--memory-gb", "10"]
    assert main([*ON, *words, "loop.micro_batch_size=64"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "does not fit: a rank needs" in printed
    assert "more than the 9.5 GB there are" in printed
    assert "What fits: loop.micro_batch_size=" in printed
    assert main([*ON, *words, "loop.micro_batch_size=1"]) == 0


def test_assumptions_can_be_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "2", "--peak-tflops", "500", "--matmul-share", "0.4", "--network-gbit", "800"]
    assert main([*ON, *words, "--newton-schulz-share", "0.3", "--link-share", "0.9"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "products at 40% of 500 TFLOP/s, Newton-Schulz at 30%, links at 90% of 450 GB/s" in printed
    assert "100 GB/s between" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h100"], "no data sheet of 'h100'; there are a100-40gb"),
        (["--nodes", "2", "--world-size", "4"], "give either --world-size or --nodes and --gpus-per-node"),
        (["--world-size", "3", "dist.zero=3", "dist.replicas=2"], "dist.replicas 2 does not divide the 3 ranks"),
        (["--json", "/nowhere/plan.json"], "--json: cannot write /nowhere/plan.json"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main([*ON, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_names_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert [name for name in DEVICES if name != "cpu" and name not in text] == []


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (999.99, "1 kB"), (1234, "1.234 kB"), (2.5e18, "2.5 EB")]
)
def test_units(value: float, text: str) -> None:
    assert scaled(value, "B") == text
