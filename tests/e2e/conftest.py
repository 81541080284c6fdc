"""A config for runs whose losses are compared bit by bit, wherever they run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = """\
name = "{name}"
[data]
path = {data}
seq_len = 32
[model]
num_layers = 1
hidden_size = 32
intermediate_size = 64
num_heads = 2
[schedule]
warmup_steps = 5
[loop]
steps = {steps}
batch_size = 16
precision = "float32"
device = "cpu"
threads = 1
[optim.newton_schulz]
dtype = "float32"
[eval]
interval_steps = 0
final_tokens = 2048
[track]
interval_steps = 1
console = false
"""


@pytest.fixture
def write_config(stdlib_data: Path) -> Callable[..., None]:
    """`write_config(folder, "job", steps=40, more="")`: makes folder/job.toml, with `more` tables at its end."""

    def write(folder: Path, name: str, *, steps: int, more: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = CONFIG.format(name=name, data=json.dumps(str(stdlib_data)), steps=steps)
        (folder / f"{name}.toml").write_text(text + more)

    return write
