"""The code of docs/optimizer.md that stands alone runs, on ranks too."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "optimizer.md").read_text()


def own_loop() -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return next(block for block in blocks if "ZeroDataParallel" in block)


def test_own_loop_runs_on_ranks(run_ranks) -> None:
    def run(rank: int, size: int) -> list[torch.Tensor]:
        torch.manual_seed(0 if size == 1 else rank)
        names: dict[str, object] = {}
        exec(compile(own_loop(), "optimizer.md", "exec"), names)
        return [p.detach() for p in names["model"].parameters()]  # type: ignore[attr-defined]

    first, second = run_ranks(run, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(weight.isfinite().all() for weight in run(0, 1))
