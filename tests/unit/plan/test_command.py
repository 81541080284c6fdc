"""The command: what it prints and writes, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muonlm.cli.main import main
from muonlm.config.errors import UserError
from muonlm.config.load import load_train
from muonlm.plan import machine
from muonlm.plan.fit import check_fits
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
    assert f"largest micro-batch that fits: {found['largest_micro_batch']}" in printed
    assert "Predicted time of a step, not measured" in printed


def test_a_run_that_cannot_fit_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "1", "--gpus-per-node", "8", "--memory-gb", "10"]
    assert main([*ON, *words, "loop.micro_batch_size=64"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "does not fit: a rank needs" in printed
    assert "more than the 9.5 GB there are" in printed
    assert "What fits: loop.micro_batch_size=" in printed
    assert main([*ON, *words, "loop.micro_batch_size=1"]) == 0


@pytest.mark.parametrize("ranks", [1, 4])
def test_without_hardware_it_judges_as_training_here_would(
    ranks: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    command = ["plan", "smoke", "--vocab-size", "1024", "--world-size", str(ranks)]
    assert main([*command, "--json", str(file)]) == 0
    capsys.readouterr()
    needed = json.loads(file.read_text())["memory_bytes"]["peak"]
    config = load_train("smoke", ["loop.precision=float32"])
    for left, code in ((ranks * needed, 0), (ranks * needed - 1, 1)):
        monkeypatch.setattr(machine, "host_memory_bytes", lambda left=left: left)
        assert main(command) == code
        printed = " ".join(capsys.readouterr().out.split())
        assert f"of {scaled(left // ranks, 'B')} (100% of a rank's part of what this machine has left)" in printed
    with pytest.raises(UserError) as refused:
        check_fits(config, world_size=ranks, vocab_size=1024, memory_bytes=needed - 1, device="cpu")
    words = str(refused.value).removesuffix(". loop.check_memory=false starts the run all the same")
    assert printed.endswith(f"does not fit: {words}")
    # Where hardware is named, this machine does not matter.
    assert main([*command, "--gpu", "l40s-48gb"]) == main([*command, "--memory-gb", "1"]) == 0
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: None)
    assert main(command) == 0
    assert "that fits" not in capsys.readouterr().out.rpartition("smoke on")[2]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--nodes", "1"],
            "a rank has 64 of a step's 512 sequences, in 4 micro-batches of 16; "
            "largest micro-batch that fits: 64, all that it has",
        ),
        (["--nodes", "1", "--memory-gb", "16"], "in 4 micro-batches of 16; largest micro-batch that fits: 16"),
        (["--nodes", "4", "--memory-gb", "1"], "in 1 micro-batch of 16; largest micro-batch that fits: none"),
    ],
)
def test_batches_of_a_rank(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    main([*ON, *words])
    assert f"{line}\n" in capsys.readouterr().out


def test_a_smaller_micro_batch_is_advised_before_a_larger_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ON, "--nodes", "16", "loop.micro_batch_size=24"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "; take loop.micro_batch_size=4, or loop.batch_size=3072, or another number of ranks" in said
    assert main([*ON, "--nodes", "16", "loop.micro_batch_size=4"]) == 0
    assert main([*ON, "--nodes", "16", "loop.micro_batch_size=24", "loop.batch_size=3072"]) == 0
    capsys.readouterr()
    assert main([*ON, "--nodes", "12"]) == 2  # where no micro-batch helps
    assert "loop.batch_size 512 is not divisible by 96 ranks" in " ".join(capsys.readouterr().err.split())


def test_advice_is_printed_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = ["--nodes", "8", "--network-gbit", "100", "dist.zero=3", "loop.micro_batch_size=1", "--json", str(file)]
    assert main([*ON, *words]) == 0
    advice = json.loads(file.read_text())["advice"]
    assert advice.startswith("slow: ")
    assert " ".join(capsys.readouterr().out.split()).endswith(advice)


def test_assumptions_can_be_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "2", "--peak-tflops", "500", "--matmul-share", "0.4", "--network-gbit", "800"]
    assert main([*ON, *words, "--newton-schulz-share", "0.3", "--link-share", "0.9"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "products at 40% of 500 TFLOP/s, Newton-Schulz at 30%, links at 90% of 450 GB/s" in printed
    assert "100 GB/s between" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h100"], "no data sheet of 'h100'; did you mean h100-80gb? there are a100-40gb"),
        (["--gpu", "A100"], "did you mean a100-40gb or a100-80gb?"),
        (["--gpu", "gb200"], "did you mean b200-180gb?"),
        (["--gpu", "tpu-v5e"], "no data sheet of 'tpu-v5e'; there are a100-40gb"),
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


def test_deepspeed_is_planned_as_the_other_engine(capsys) -> None:
    printed = []
    for engine in ("torch", "deepspeed"):
        assert main([*ON, "--world-size", "4", "--memory-gb", "80", "dist.zero=3", f"dist.engine={engine}"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[1] == printed[0] + (
        'dist.engine = "deepspeed": what torch\'s engine keeps and sends is planned, and no offload\n'
    )
