"""Fused weights, heads and experts, sharded so that boundaries between ranks fall inside of them."""

from __future__ import annotations

import pytest
import torch

from muonlm.optim.pieces import Split

# (shape, split): heads of 7 or less, of which every way of sharding below cuts some.
FUSED: list[tuple[tuple[int, ...], Split]] = [
    ((35, 24), Split((21, 7, 7))),  # 3 query heads, then a key and a value head
    ((85, 24), Split((8, 4, 5), groups=5)),  # interleaved by key head, values narrower than queries
    ((46, 24), Split((23, 23))),  # gate and up
    ((35, 24), Split((7,), groups=5, separate_groups=True)),  # a matrix for each head
    ((24, 35), Split((7,), groups=5, separate_groups=True, dim=1)),  # of an output projection
    ((3, 46, 20), Split((23, 23))),  # gate and up of experts
]
LAYOUTS = [
    (2, "fsdp"),
    (3, "fsdp"),
    (4, "fsdp"),
    (4, "hsdp"),
    (2, "tp"),
    (3, "tp"),
    (4, "fsdp-tp"),
    (3, "cut:0"),
    (3, "cut:1"),
    (2, "mixed"),
    (3, "replicated"),
]
SHAPES, SPLITS = [shape for shape, _ in FUSED], [split for _, split in FUSED]


def test_every_split_is_cut_inside_a_head() -> None:
    """What the tests below are about: ceil(rows / world) is not where a segment ends, for a world of 2 at least."""
    for shape, split in FUSED:
        length = shape[len(shape) - 2 + split.dim]
        ends = {begin + size for segments in split.segments() for begin, size in segments}
        assert any(-(-length // world) not in ends for world in (2, 3, 4))


@pytest.mark.parametrize(
    ("world", "layout", "dtype"),
    [(*each, torch.float32) for each in LAYOUTS] + [(2, "fsdp", torch.bfloat16), (4, "fsdp-tp", torch.bfloat16)],
)
def test_pieces_are_those_of_one_process_bit_for_bit(steps_on, world, layout, dtype) -> None:
    options = {"splits": SPLITS, "dtype": dtype, "scaling": "jordan"}
    expected = steps_on(1, SHAPES, layout, **options)[0]
    num_pieces = sum(len(s.segments()) for s in SPLITS) + 2 * len(SPLITS[-1].segments())
    for result in steps_on(world, SHAPES, layout, bucket_bytes=4096, **options):
        assert len(result["plan"].pieces) == num_pieces
        for key in ("weights", "momenta"):
            for mine, whole in zip(result[key], expected[key], strict=True):
                assert torch.equal(mine, whole)


@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (3, "tp"), (4, "fsdp-tp"), (2, "mixed"), (3, "replicated")])
def test_pieces_shared_by_ranks_give_the_same_up_to_rounding(steps_on, world, layout) -> None:
    options = {"splits": SPLITS, "dtype": torch.float32, "scaling": "spectral"}
    expected = steps_on(1, SHAPES, layout, **options)[0]
    for result in steps_on(world, SHAPES, layout, split_min_flops=0, **options):
        for mine, whole in zip(result["weights"], expected["weights"], strict=True):
            assert ((mine - whole).norm() / whole.norm()).item() <= 1e-6


@pytest.mark.parametrize("layout", ["mixed", "hsdp"])
def test_a_replicated_matrix_shared_by_all_its_holders_comes_back_whole(steps_on, layout) -> None:
    """Alone in its round beside sharded ones: each holder has computed a part of it and needs the others'."""
    shapes, options = [(8, 8), (40, 40), (8, 8)], {"dtype": torch.float32, "split_min_flops": 2**20}
    world = 4 if layout == "hsdp" else 2
    expected = steps_on(1, shapes, layout, **options)[0]
    for result in steps_on(world, shapes, layout, bucket_bytes=64, **options):
        assert len(result["plan"].assignment.workers[1]) > 1
        for mine, whole in zip(result["weights"], expected["weights"], strict=True):
            assert ((mine - whole).norm() / whole.norm()).item() <= 1e-6
