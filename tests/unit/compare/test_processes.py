"""Real training in real worker processes: results come back, and a signal saves what runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import pytest

from muonlm.config.compare import CompareConfig
from muonlm.config.load import validate

DATA = """
output = "tokens"
validation_fraction = 0.2
source = {{ kind = "text", files = ["{stdlib}/json/*.py", "{stdlib}/email/*.py"] }}
tokenizer = {{ vocab_size = 300 }}
"""
BASE = """
name = "base"
data = { path = "tokens", prepare = "data.toml", seq_len = 32 }
model = { num_layers = 1, hidden_size = 16, intermediate_size = 32, num_heads = 2 }
schedule = { warmup_steps = 2 }
loop = { tokens = 4096, batch_size = 8, device = "cpu" }
eval = { interval_steps = 4, tokens = 1024, final_tokens = 2048 }
track = { interval_steps = 2 }
"""
SCRIPT = """
import sys
from muonlm.compare.run import compare
from muonlm.config.compare import CompareConfig
if __name__ == "__main__":
    print(compare(CompareConfig.model_validate_json(sys.stdin.read()))["state"])
"""


@pytest.fixture
def command(tmp_path: Path):
    """Starts a comparison with the given budget in a process of its own, in a directory of its own."""
    (tmp_path / "data.toml").write_text(DATA.format(stdlib=sysconfig.get_paths()["stdlib"]))
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}

    def start(budget: int) -> subprocess.Popen[str]:
        rates = {"lr": [4e-3], "aux_lr": [1e-2]}
        arms = [{"name": kind, "set": {"optim.kind": kind}, **rates} for kind in ("adamw", "muon")]
        raw = {"name": "tiny", "output_dir": "out", "base": "base.toml", "arms": arms, "reference": "adamw"}
        config = validate(CompareConfig, raw | {"budgets_tokens": [budget], "seeds": [0], "jobs": 2}, "test")
        process = subprocess.Popen(
            [sys.executable, "script.py"], cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(config.model_dump_json())
        process.stdin.close()
        process.stdin = None
        return process

    return start


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_worker_processes_train_and_report_back(command, tmp_path: Path) -> None:
    output, _ = command(4096).communicate(timeout=120)
    assert output.splitlines()[-1] == "finished", output
    result = read(tmp_path / "out" / "compare.json")
    output, _ = command(4096).communicate(timeout=120)
    assert "2 finished runs found" in output, "runs as the training loop wrote them have the settings asked for"
    for trial in result["trials"]:
        status = read(tmp_path / "out" / trial["run_dir"] / "status.json")
        assert (trial["final_loss"], trial["tokens"]) == (status["final_loss"], 4096)
        assert list((tmp_path / "out" / trial["run_dir"] / "checkpoints").glob("step_*"))
    assert {arm["config"]["optim"]["kind"] for arm in result["arms"]} == {"adamw", "muon"}
    assert result["verdict"]["reproduced"] is None
    assert "was not tuned" in result["verdict"]["text"]


def wait_for_both_runs(process: subprocess.Popen[str], runs: Path, num_records: int = 1) -> None:
    deadline = time.monotonic() + 120
    while sum(count_lines(file) >= num_records for file in runs.glob("*/*/metrics.jsonl")) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n")


def worker_ids(process: subprocess.Popen[str]) -> list[int]:
    """Grandchildren: the workers are children of the fork server, which is a child of the comparison."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return [number for number, parent in parents.items() if parents.get(parent) == process.pid]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_ends_the_comparison_which_then_goes_on(command, tmp_path: Path) -> None:
    process = command(20_000_000)
    runs = tmp_path / "out" / "runs"
    wait_for_both_runs(process, runs, num_records=3)
    assert len(worker_ids(process)) == 2
    os.kill(worker_ids(process)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "UserError: A worker process died, perhaps for lack of memory" in output
    assert "(fewer runs at a time: jobs = 1)" in output
    assert read(tmp_path / "out" / "compare.json")["state"] == "interrupted"
    assert sorted(read(status)["state"] for status in runs.glob("*/*/status.json")) == ["preempted", "running"]

    saved = {read(status)["step"] for status in runs.glob("*/*/status.json") if read(status)["state"] == "preempted"}
    process = command(20_000_000)
    deadline = time.monotonic() + 120
    while sum('"resume"' in file.read_text() for file in runs.glob("*/*/metrics.jsonl")) < len(saved):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_runs_are_saved_when_the_comparison_is_stopped_or_killed(command, tmp_path: Path, number: int) -> None:
    process = command(20_000_000)
    runs = tmp_path / "out" / "runs"
    wait_for_both_runs(process, runs, num_records=3)
    deadline = time.monotonic() + 120
    process.send_signal(number)
    output = process.communicate(timeout=60)[0] if number == signal.SIGINT else process.wait()
    while any(read(status)["state"] == "running" for status in runs.glob("*/*/status.json")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert {read(status)["state"] for status in runs.glob("*/*/status.json")} == {"preempted"}
    assert len(list(runs.glob("*/*/checkpoints/step_*/complete.json"))) == 2
    if number == signal.SIGINT:
        assert "the same command goes on from here" in output
        assert output.splitlines()[-1] == "interrupted"
