"""docs/exporting.md is true: its commands and programs run, in its order, in one empty directory, without a network."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "exporting.md").read_text()
BLOCKS = re.findall(r"```(bash|python|yaml)\n(.*?)```", PAGE, re.DOTALL)
MODULES = {"muonlm": "muonlm", "lm_eval": "lm_eval"}


def run(arguments: list[str], folder: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
    }
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{arguments}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


@pytest.mark.slow
def test_everything_on_the_page_runs(tmp_path: Path) -> None:
    for language, text in BLOCKS:
        if language == "yaml":
            name, content = text.split("\n", 1)
            (tmp_path / name.removeprefix("# ")).write_text(content)
        elif language == "python":
            run(["-c", text], tmp_path)
        else:
            for words in map(shlex.split, text.splitlines()):
                run(["-m", MODULES[words[0]], *words[1:]], tmp_path)
    metrics = [json.loads(line) for line in (tmp_path / "runs/smoke/metrics.jsonl").read_text().splitlines()]
    trained = next(record["bits_per_byte"] for record in metrics if record.get("final"))
    (results,) = (tmp_path / "results").rglob("results_*.json")
    measured = json.loads(results.read_text())["results"]["heldout"]["bits_per_byte,none"]
    # Other text of the same kind, in windows of the same length.
    assert abs(measured - trained) < 1.0

    continued = [json.loads(line) for line in (tmp_path / "runs/continued/metrics.jsonl").read_text().splitlines()]
    first = next(record["loss"] for record in continued if record["kind"] == "train")
    last = [record["loss"] for record in metrics if record["kind"] == "train"][-1]
    untrained = next(record["loss"] for record in metrics if record["kind"] == "train")
    assert first < (last + untrained) / 2, "the run did not start from the weights of init_from"
