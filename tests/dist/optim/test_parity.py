"""Sharded in any way, Muon takes the step of one process: bit for bit where matrices are orthogonalized whole."""

from __future__ import annotations

import pytest
import torch

GPT = [(32, 32), (16, 32), (16, 32), (32, 32), (96, 32), (96, 32), (32, 96)]
CASES = [
    # (world, layout, shapes)
    (2, "fsdp", GPT),
    (3, "fsdp", GPT),
    (4, "fsdp", GPT),
    (2, "fsdp", [(65, 128)]),
    (2, "fsdp", [(1, 64)]),
    (4, "fsdp", [(1, 64), (3, 16), (33, 17)]),
    (3, "fsdp", [(18, 64), (64, 18), (5, 5)]),
    (4, "hsdp", GPT),
    (4, "hsdp", [(65, 128), (1, 64), (3, 8)]),
    (2, "tp", GPT),
    (3, "tp", [(33, 48), (48, 33), (7, 64)]),
    (4, "tp", GPT),
    (4, "fsdp-tp", GPT),
    (4, "fsdp-tp", [(18, 64), (64, 18), (65, 33)]),
    (2, "mixed", GPT),
    (4, "mixed", [(17, 40), (40, 17), (9, 9), (64, 64)]),
    (2, "replicated", GPT),
    (3, "cut:0", [(6, 24, 16)]),
    (4, "cut:0", [(6, 24, 16)]),
    (3, "cut:1", [(6, 25, 16), (2, 16, 40)]),
    (4, "cut:2", [(6, 24, 18)]),
    (2, "fsdp", [(4, 24, 16), (32, 16), (16, 16)]),
]
EIGHT_RANKS = [
    (8, "fsdp", [(18, 64), (1, 64)]),
    (8, "fsdp", GPT[:5]),
    (8, "hsdp", GPT),
    (8, "tp", GPT),
    (8, "fsdp-tp", [*GPT, (18, 64)]),
    (8, "replicated", GPT[:5]),
    (8, "cut:0", [(6, 24, 16)]),
    (8, "cut:1", [(6, 24, 16)]),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in EIGHT_RANKS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "layout", "shapes"), CASES)
def test_equals_one_process_bit_for_bit(steps_on, world, layout, shapes, dtype) -> None:
    expected = steps_on(1, shapes, layout, dtype=dtype)[0]
    for result in steps_on(world, shapes, layout, dtype=dtype, bucket_bytes=8192):
        for key in ("weights", "momenta"):
            for mine, whole in zip(result[key], expected[key], strict=True):
                assert torch.equal(mine, whole)


@pytest.mark.parametrize("layout", ["replicated", "fsdp", "tp"])
@pytest.mark.parametrize(("world", "shapes"), [(3, [(48, 48)]), (4, [(24, 96), (96, 24)]), (4, [(40, 64), (8, 8)])])
def test_matrices_shared_by_ranks_give_the_same_up_to_rounding(steps_on, world, layout, shapes) -> None:
    options = {"dtype": torch.float32, "split_min_flops": 0}
    expected = steps_on(1, shapes, layout, **options)[0]
    results = steps_on(world, shapes, layout, **options)
    assert any(len(team) > 1 for team in results[0]["plan"].assignment.workers)
    for result in results:
        for mine, first, whole in zip(result["weights"], results[0]["weights"], expected["weights"], strict=True):
            assert torch.equal(mine, first)
            assert ((mine - whole).norm() / whole.norm()).item() <= 1e-6
