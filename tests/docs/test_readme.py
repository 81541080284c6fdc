"""The README is true: every command in it runs, in its order, in one empty directory."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MAKE_TARGETS = {"make demo", "make env", "make test"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_commands_that_install_and_test_are_those_of_the_makefile():
    shown = {line for line in commands() if line.startswith("make")}
    assert shown == MAKE_TARGETS
    for target in shown:
        plan = subprocess.run([*shlex.split(target), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert plan.returncode == 0, plan.stderr
    assert (
        "-m muonlm compare demo"
        in subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.timeout(900)
def test_every_command_runs(tmp_path: Path):
    """One tour, in order, because later commands read what earlier ones wrote."""
    (tmp_path / "docs").mkdir()
    for number in range(60):
        text = (ROOT / "docs" / "data.md").read_text().replace("token", f"token{number}")
        (tmp_path / "docs" / f"{number}.md").write_text(text)
    tour = [line for line in commands() if not line.startswith(("make", "pip", "python3 -m venv"))]
    assert len(tour) >= 12
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    for line in tour:
        words = shlex.split(line.removeprefix(".venv/bin/"))
        assert words[0] in ("muonlm", "torchrun"), f"no rule how to test: {line}"
        module = {"muonlm": ["muonlm"], "torchrun": ["torch.distributed.run"]}[words[0]]
        result = subprocess.run(
            [sys.executable, "-m", *module, *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert result.returncode == 0, f"{line}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    for written in ("runs/smoke/report.html", "runs/compare-smoke/report.html", "runs/adam/metrics.jsonl"):
        assert (tmp_path / written).stat().st_size > 1000, written


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str):
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["orthogonal"].shape) == (12, 64, 256)  # type: ignore[attr-defined]
