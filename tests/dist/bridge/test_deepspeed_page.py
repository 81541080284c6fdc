"""The script of docs/deepspeed.md runs on two ranks and learns; its table of refused keys is the guards'."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muonlm.bridge.deepspeed.guards import TESTED

PAGE = (Path(__file__).parents[3] / "docs" / "deepspeed.md").read_text()


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


def test_the_page_names_the_tested_version() -> None:
    assert f"now that is {', '.join(TESTED)}." in PAGE
