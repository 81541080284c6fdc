"""The scripts of docs/deepspeed.md run, learn and export; its table of refused keys is the guards'."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muonlm.bridge.deepspeed.guards import TESTED

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "deepspeed.md").read_text()
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def test_the_scripts_learn_on_two_ranks_and_export(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """As torchrun starts it: nothing is initialised. Then the one that goes on from its checkpoint, in one process."""
    pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    script, export = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

    def body(rank: int, world: int) -> tuple[str, list[str], list[int]]:
        os.chdir(tmp_path)
        out, names = io.StringIO(), {"__name__": "__main__"}
        with contextlib.redirect_stdout(out), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            exec(compile(script, "deepspeed.md", "exec"), names)
        renamed = [str(w.message) for w in warned if "torch.distributed" in str(w.message)]
        return out.getvalue(), renamed, names["ids"][:, 0].tolist()

    (first, renamed, ids), (_, _, other_ids) = on_ranks(body, 2, join=False)
    losses = [float(number) for number in re.findall(r"step \d+ loss (.*)", first)]
    assert len(losses) == 3
    assert losses[-1] < 0.5 * losses[0]
    assert renamed == []
    assert ids != other_ids
    assert (tmp_path / "checkpoint" / ".metadata").is_file()

    model = script[script.index("sizes =") : script.index("optimizer =")].replace("manual_seed(0)", "manual_seed(9)")
    imports = "import torch\nfrom transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForCausalLM as Model\n"
    check = """
        ids = torch.arange(32)[None]
        print(*(step.item() for state in optimizer.state.values() for key, step in state.items() if key == "step"))
        print(Model.from_pretrained("exported")(input_ids=ids, labels=ids).loss.item())
    """
    code = imports + model + export + textwrap.dedent(check)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    steps, loss = done.stdout.splitlines()[-2:]
    assert set(steps.split()) == {"11.0"}
    assert float(loss) < 0.5 * losses[0]


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
        env=ENVIRONMENT,
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
