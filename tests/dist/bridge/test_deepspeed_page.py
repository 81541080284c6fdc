"""The script of docs/deepspeed.md runs on two ranks and learns; its table of refused keys is the guards'."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muonlm.bridge.deepspeed.guards import TESTED

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "deepspeed.md").read_text()


def test_the_script_learns_on_two_ranks(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """As torchrun starts it: nothing is initialised."""
    pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

    def body(rank: int, world: int) -> str:
        os.chdir(tmp_path)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(script, "deepspeed.md", "exec"), {"__name__": "__main__"})
        return out.getvalue()

    first, _ = on_ranks(body, 2, join=False)
    losses = [float(number) for number in re.findall(r"step \d+ loss (.*)", first)]
    assert len(losses) == 3
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "checkpoint" / ".metadata").is_file()


@pytest.mark.parametrize("alone", [False, True])
def test_the_command_trains_under_the_engine(stdlib_data: Path, tmp_path: Path, alone: bool) -> None:
    """And without torchrun; with the keys that the page shows."""
    pytest.importorskip("deepspeed")
    (command,) = re.findall(r"```bash\n(torchrun .*)\n```", PAGE)
    (keys,) = re.findall(r"```json\n(.*)\n```", PAGE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stdlib").symlink_to(stdlib_data)
    (tmp_path / "offload.json").write_text(keys)
    words = [str(Path(sys.executable).with_name("torchrun")), *shlex.split(command)[1:], "loop.steps=6"]
    if alone:
        words = [sys.executable, *words[words.index("-m") :]]
    done = subprocess.run(
        [*words, "dist.deepspeed_config=offload.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    recorded = json.loads((tmp_path / "runs" / "smoke-deepspeed" / "environment.json").read_text())
    assert recorded["deepspeed"].startswith(TESTED[-1])
    zero = json.loads(keys)["zero_optimization"]
    assert recorded["deepspeed_config"]["zero_optimization"] == {**zero, "stage": 2}
    assert json.loads((tmp_path / "runs" / "smoke-deepspeed" / "status.json").read_text())["state"] == "finished"


def test_the_page_names_the_tested_version() -> None:
    assert f"now that is {', '.join(TESTED)}." in PAGE
