"""Layouts of every way of sharding: what torch would leave on each rank, element by element."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.optim.layout import Box, Layout, MeshShard, as_stack, flat_ranges, mesh_layout, replicated


def owners(layout: Layout) -> torch.Tensor:
    """How often each element of the parameter is held."""
    count = torch.zeros(layout.shape, dtype=torch.int64)
    everything = Box((0, 0, 0), layout.shape)
    for holding in layout.holdings:
        count[holding.box.within(everything)] += 1
    return count


def local(layout: Layout, rank: int, whole: torch.Tensor) -> torch.Tensor:
    """What `rank` holds, flat, each block at its offset."""
    held = layout.by_rank.get(rank, ())
    out = torch.full((sum(h.box.numel for h in held),), -1, dtype=whole.dtype)
    everything = Box((0, 0, 0), layout.shape)
    for holding in held:
        block = whole[holding.box.within(everything)].reshape(-1)
        out[holding.offset : holding.offset + len(block)] = block
    return out


def test_rows_are_cut_as_torch_chunks_them() -> None:
    whole = torch.arange(18 * 4).view(1, 18, 4)
    layout = mesh_layout((1, 18, 4), ((8,), tuple(range(8))), (MeshShard(1),))
    chunks = whole.chunk(8, dim=1)
    assert len(chunks) == 6  # of 3 rows: two ranks have nothing
    for rank in range(8):
        expected = chunks[rank].reshape(-1) if rank < len(chunks) else torch.empty(0, dtype=torch.int64)
        assert torch.equal(local(layout, rank, whole), expected)
    assert set(layout.by_rank) == set(range(6))
    assert layout.num_copies == 1


def test_one_row_lies_on_one_rank() -> None:
    layout = mesh_layout((1, 1, 64), ((2,), (0, 1)), (MeshShard(1),))
    assert list(layout.by_rank) == [0]


def test_fsdp_over_tensor_parallel_rows_is_strided() -> None:
    """Tensor parallelism cuts first, FSDP2 cuts what it left: the mesh is (dp, tp), the cuts are tp, then dp."""
    whole = torch.arange(10 * 3).view(1, 10, 3)
    layout = mesh_layout((1, 10, 3), ((2, 2), (0, 1, 2, 3)), (MeshShard(1, strided=True), MeshShard(1)))
    for dp in range(2):
        for tp in range(2):
            expected = whole.chunk(2, 1)[tp].chunk(2, 1)[dp].reshape(-1)
            assert torch.equal(local(layout, 2 * dp + tp, whole), expected)
    assert int(owners(layout).min()) == int(owners(layout).max()) == 1


def test_unstrided_axes_cut_in_the_order_of_the_mesh() -> None:
    whole = torch.arange(10 * 3).view(1, 10, 3)
    layout = mesh_layout((1, 10, 3), ((2, 2), (0, 1, 2, 3)), (MeshShard(1), MeshShard(1)))
    assert torch.equal(local(layout, 1, whole), whole.chunk(2, 1)[0].chunk(2, 1)[1].reshape(-1))


def test_kernels_are_cut_between_input_channels() -> None:
    """(out, in, 3, 3) seen as (1, out, 9 in): a cut of dim 1 falls between multiples of 9 columns."""
    layout = mesh_layout((1, 4, 5 * 9), ((2,), (0, 1)), (MeshShard(2, unit=9),))
    assert [holding.box.shape for holding in layout.holdings] == [(1, 4, 27), (1, 4, 18)]


def test_replicas_and_the_sender_of_ones_own_replica() -> None:
    layout = mesh_layout((1, 6, 2), ((2, 3), (0, 1, 2, 3, 4, 5)), (MeshShard(None), MeshShard(1)))
    assert layout.num_copies == 2
    first = layout.by_rank[0][0].box
    assert layout.by_box[first] == (0, 3)
    assert layout.source(first, receiver=1) == 0
    assert layout.source(first, receiver=5) == 3
    assert layout.holders_of(first) == [0, 3]
    assert layout.holders_of(Box((0, 0, 0), (1, 6, 2))) == []


def test_holders_of_a_part_of_a_block() -> None:
    layout = mesh_layout((4, 6, 2), ((2,), (0, 1)), (MeshShard(0),))
    assert layout.holders_of(Box((1, 2, 0), (1, 3, 2))) == [0]
    assert layout.holders_of(Box((1, 0, 0), (2, 6, 2))) == []
    assert replicated((1, 2, 2), [4, 7]).holders_of(Box((0, 0, 0), (1, 1, 1))) == [4, 7]


def test_missing_elements_are_found() -> None:
    with pytest.raises(ValueError, match="do not make up"):
        _ = flat_ranges((1, 4, 4), [(0, 0, 7), (1, 8, 16)]).num_copies


@settings(max_examples=150, deadline=None)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.lists(st.integers(0, 130), max_size=6), st.integers(1, 4))
def test_flat_ranges_lie_as_the_flattened_parameter(shape: tuple[int, int, int], cuts: list[int], ranks: int) -> None:
    numel = math.prod(shape)
    borders = sorted({0, numel, *(cut % (numel + 1) for cut in cuts)})
    ranges = [(i % ranks, a, b) for i, (a, b) in enumerate(pairwise(borders))]
    layout = flat_ranges(shape, ranges)
    assert bool((owners(layout) == 1).all())
    whole = torch.arange(numel).view(shape)
    for rank in range(ranks):
        expected = torch.cat([torch.arange(a, b) for r, a, b in ranges if r == rank] or [torch.empty(0).long()])
        assert torch.equal(local(layout, rank, whole), expected)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.integers(1, 7)] * 3),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([None, 0, 1, 2])), min_size=1, max_size=3),
)
def test_any_mesh_holds_every_element_equally_often(
    shape: tuple[int, int, int], axes: list[tuple[int, int | None]]
) -> None:
    sizes = tuple(size for size, _ in axes)
    layout = mesh_layout(shape, (sizes, tuple(range(math.prod(sizes)))), tuple(MeshShard(dim) for _, dim in axes))
    copies = math.prod(size for size, dim in axes if dim is None)
    assert bool((owners(layout) == copies).all())
    assert layout.num_copies == copies
    assert len({holding.rank for holding in layout.holdings}) == len(layout.holdings)


def test_keys_tell_layouts_apart() -> None:
    mesh = ((2, 2), (0, 1, 2, 3))
    keys = [
        mesh_layout((1, 8, 8), mesh, axes).key
        for axes in (
            (MeshShard(1), MeshShard(1)),
            (MeshShard(1, strided=True), MeshShard(1)),
            (MeshShard(None), MeshShard(1)),
            (MeshShard(1), MeshShard(2)),
        )
    ]
    keys += [mesh_layout((1, 8, 8), ((2, 2), (0, 2, 1, 3)), (MeshShard(1), MeshShard(1))).key]
    keys += [replicated((1, 8, 8), range(4)).key, flat_ranges((1, 8, 8), [(0, 0, 64)]).key]
    assert len(set(keys)) == len(keys)


def test_shapes_as_stacks() -> None:
    assert as_stack((4, 3), is_stack=False) == (1, 4, 3)
    assert as_stack((4, 3, 5), is_stack=True) == (4, 3, 5)
    assert as_stack((4, 3, 5, 5), is_stack=False) == (1, 4, 75)
    with pytest.raises(ValueError, match="no matrix"):
        as_stack((4,), is_stack=False)
