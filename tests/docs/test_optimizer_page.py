"""The code of docs/optimizer.md that stands alone runs, on ranks too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

PAGE = (Path(__file__).parents[2] / "docs" / "optimizer.md").read_text()


def block(word: str) -> str:
    return next(b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if word in b)


def run(word: str, rank: int) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    names: dict[str, object] = {}
    exec(compile(block(word), "optimizer.md", "exec"), names)
    params = names["model"].parameters()  # type: ignore[attr-defined]
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in params]


@pytest.mark.parametrize("word", ["ZeroDataParallel", "fully_shard"])
def test_own_loop_runs_on_ranks(run_ranks, word) -> None:
    first, second = run_ranks(lambda rank, size: run(word, rank), 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(weight.isfinite().all() for weight in first)


def test_own_zero_loop_runs_on_one_process() -> None:
    assert all(weight.isfinite().all() for weight in run("ZeroDataParallel", 0))
