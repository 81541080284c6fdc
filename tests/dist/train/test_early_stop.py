"""A signal before the first step: exit code 0, on all ranks, and the same command goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Runs the command line; the first import of the module named first sends this process the signal named second.
SCRIPT = """
import os, signal, sys
from muonlm.cli.main import main
module, signum = sys.argv[1:3]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), getattr(signal, signum))
sys.meta_path.insert(0, Finder())
sys.exit(main(sys.argv[3:]))
"""


def _start(module: str, signum: str, words: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, module, signum, "train", *words],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _words(run_dir: Path, data: Path) -> list[str]:
    changes = ("loop.steps=2", "loop.device=cpu", "loop.threads=1", "schedule.warmup_steps=1", "eval.final_tokens=64")
    return ["smoke", f"run_dir={run_dir}", f"data.path={data}", "data.prepare=", *changes]


@pytest.mark.parametrize(
    ("module", "signum"), [("pydantic", "SIGTERM"), ("torch", "SIGUSR1"), ("muonlm.model.build", "SIGINT")]
)
def test_while_modules_load_one_process_ends_at_once(
    tmp_path: Path, stdlib_data: Path, module: str, signum: str
) -> None:
    process = _start(module, signum, _words(tmp_path / "run", stdlib_data))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors == "stopped before the first step; repeat the same command to go on\n"
    assert not (tmp_path / "run").exists()


def test_while_modules_load_all_ranks_end_together(tmp_path: Path, stdlib_data: Path, free_port: int) -> None:
    words = _words(tmp_path / "run", stdlib_data)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    modules = ("none", "torch")  # rank 1 alone gets the signal
    ranks = [
        _start(module, "SIGTERM", words, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank, module in enumerate(modules)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert "preempted at step 0" in outputs[0][0]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 0)
    again = _start("none", "SIGTERM", words)
    output, errors = again.communicate(timeout=60)
    assert (again.returncode, "finished at step 2" in output) == (0, True), errors


def test_while_data_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 500)
    config = tmp_path / "data.toml"
    config.write_text(
        f'output = "{tmp_path}/out"\nvalidation_fraction = 0.1\n'
        f'[source]\nkind = "text"\nfiles = ["{tmp_path}/*.txt"]\n[tokenizer]\nvocab_size = 300\n'
    )
    words = [*_words(tmp_path / "run", tmp_path / "out"), f"data.prepare={config}"]
    shared = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    process = _start("torch", "SIGTERM", words, **shared)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.endswith("stopped before the first step; repeat the same command to go on\n")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()
