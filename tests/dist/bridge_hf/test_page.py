"""The programs of docs/trainer.md run as they stand, on two ranks."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[3] / "docs" / "trainer.md").read_text()
KEPT: list[object] = []
PROGRAMS = ["trainer_muon", "accelerate_muon"]


def program(name: str, folder: Path) -> Path:
    """The first block after the sentence that names the file, as that file."""
    code = re.search(rf"Save as `{name}\.py`.*?```python\n(.*?)```", PAGE, re.DOTALL)
    assert code
    assert code[1].count("\n") < 40
    path = folder / f"{name}.py"
    path.write_text(code[1])
    return path


def losses(output: str) -> list[float]:
    [line] = re.findall(r"^losses (.*)$", output, re.MULTILINE)
    return [float(number) for number in line.split()]


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_trains_on_ranks(run_ranks, tmp_path, name, capfd) -> None:
    path = program(name, tmp_path)

    def run(rank: int, size: int) -> None:
        os.chdir(tmp_path)
        # Kept until the process ends, as in a program: freeing the model here has waited for a thread forever.
        KEPT.append(runpy.run_path(str(path), run_name="__main__"))
        sys.stdout.flush()

    run_ranks(run, 2, join=False, timeout_s=120)
    if name == "accelerate_muon":  # 60 batches of a rank are 30 steps
        assert torch.load(tmp_path / name / "custom_checkpoint_0.pkl")["last_epoch"] == 30
    first, *_, last = losses(capfd.readouterr().out)
    assert first > 4
    assert last < first - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_trains_under_torchrun(tmp_path, name) -> None:
    path = program(name, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, *_, last = losses(done.stdout)
    assert first > 4
    assert last < first - 1
