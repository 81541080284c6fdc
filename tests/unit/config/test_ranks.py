"""How ranks are arranged, and what is said where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from muonlm.config.errors import UserError
from muonlm.config.ranks import RankGrid, micro_batch_size, rank_grid
from muonlm.config.schema import TrainConfig


def _config(model: dict[str, Any] | None = None, loop: dict[str, Any] | None = None, **dist: Any) -> TrainConfig:
    raw = {
        "name": "x",
        "data": {"path": "nowhere"},
        "model": {
            "kind": "gpt",
            "num_heads": 12,
            "num_kv_heads": 4,
            "intermediate_size": 96,
            "head_dim": 8,
            **(model or {}),
        },
        "loop": {"steps": 20, "batch_size": 24, **(loop or {})},
        "dist": dist,
    }
    return TrainConfig.model_validate(raw)


@pytest.mark.parametrize(
    ("dist", "world_size", "grid"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 4, (4, 1, 1)),
        ({"zero": 1}, 4, (4, 1, 1)),
        ({"zero": 2}, 3, (3, 1, 1)),
        ({"zero": 3}, 1, (1, 1, 1)),
        ({"zero": 3}, 6, (1, 6, 1)),
        ({"zero": 3, "replicas": 2}, 6, (2, 3, 1)),
        ({"zero": 3, "replicas": 6}, 6, (6, 1, 1)),
        ({"tensor_parallel": 4}, 4, (1, 1, 4)),
        ({"zero": 3, "tensor_parallel": 2}, 8, (1, 4, 2)),
        ({"zero": 3, "tensor_parallel": 2, "replicas": 2}, 8, (2, 2, 2)),
    ],
)
def test_grid(dist, world_size, grid) -> None:
    found = rank_grid(_config(**dist), world_size)
    assert found == RankGrid(*grid)
    assert found.data * found.tensor == world_size


@pytest.mark.parametrize(
    ("dist", "world_size", "message"),
    [
        (
            {"tensor_parallel": 4},
            6,
            r"tensor_parallel 4 does not divide 6 ranks; take 1 or 2, or a multiple of 4 ranks",
        ),
        ({"tensor_parallel": 2}, 1, r"tensor_parallel 2 does not divide 1 ranks; take 1, or a multiple of 2 ranks"),
        ({"tensor_parallel": 2}, 4, r"on 4 ranks leaves 2 .* needs dist.zero=3; set that, or start 2 ranks"),
        ({"tensor_parallel": 2, "zero": 1}, 4, r"needs dist.zero=3"),
        ({"zero": 3, "replicas": 4}, 6, r"replicas 4 does not divide the 6 ranks; take 1, 2, 3 or 6, or another"),
        (
            {"zero": 3, "replicas": 3, "tensor_parallel": 2},
            8,
            r"does not divide the 4 groups of 2 ranks; take 1, 2 or 4",
        ),
    ],
)
def test_ranks_that_do_not_divide(dist, world_size, message) -> None:
    with pytest.raises(UserError, match=message):
        rank_grid(_config(**dist), world_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel": 3}, r"tensor_parallel 3 does not divide model.num_kv_heads 4; what does: 1, 2, 4"),
        (
            {"tensor_parallel": 8, "model": {"intermediate_size": 100}},
            r"8 does not divide model.num_heads 12 and model.num_kv_heads 4 and model.intermediate_size 100; what",
        ),
        ({"zero": 2, "replicas": 2}, r"replicas 2 needs zero = 3; with zero = 2 every rank is a replica"),
        ({"zero": 4}, r"zero"),
    ],
)
def test_models_that_do_not_divide(changes, message) -> None:
    with pytest.raises(ValidationError, match=message):
        _config(**changes)


def test_batches_are_divided_over_the_groups_that_read_different_sequences() -> None:
    assert micro_batch_size(_config(zero=3, tensor_parallel=2), 4) == 6
    assert micro_batch_size(_config(loop={"micro_batch_size": 3}), 4) == 3
    with pytest.raises(UserError, match=r"batch_size 24 is not divisible by 5 groups of 2 ranks = 5; take .*=20"):
        micro_batch_size(_config(zero=3, tensor_parallel=2), 5)
