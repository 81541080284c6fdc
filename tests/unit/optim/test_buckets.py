"""ZeRO's buckets: every element once, whole owners, little padding, balanced work."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.optim.buckets import Item, item_of, padding_share, plan_buckets
from muonlm_kernels import matmul_flops

BUCKET = 2**24


def gpt(num_layers: int, size: int, inner: int, vocab: int) -> list[Item]:
    """In the order of the backward pass."""
    items = [Item(vocab * size), Item(size)]
    for _ in range(num_layers):
        shapes = [(size, inner), (inner, size), (inner, size), *[(size, size)] * 4]
        items += [item_of(shape, has_matrices=True, is_stack=False) for shape in shapes]
        items += [Item(size), Item(size)]
    return [*items, Item(vocab * size)]


def moe(num_layers: int, size: int, inner: int, experts: int, vocab: int) -> list[Item]:
    items = [Item(vocab * size), Item(size)]
    for _ in range(num_layers):
        stacks = [(experts, size, inner), (experts, inner, size), (experts, inner, size)]
        items += [item_of(shape, has_matrices=True, is_stack=True) for shape in stacks]
        items += [item_of((size, size), has_matrices=True, is_stack=False)] * 4
        items += [Item(experts * size), Item(size), Item(size)]
    return [*items, Item(vocab * size)]


ZOO = {"124m": gpt(12, 768, 2048, 50304), "7b": gpt(32, 4096, 11008, 32000), "moe": moe(26, 2048, 1408, 64, 102400)}


def cut_matrices(items: list[Item], buckets: list) -> set[int]:
    """Items of which a matrix does not lie whole on one rank."""
    out = set()
    for bucket in buckets:
        for entry in bucket.entries:
            item = items[entry.item]
            if item.count:
                size = item.numel // item.count
                if entry.begin % size or entry.end % size:
                    out.add(entry.item)
    return out


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 16])
def test_padding_and_balance_on_real_shapes(name, num_ranks) -> None:
    items = ZOO[name]
    buckets = plan_buckets(items, num_ranks, BUCKET)
    assert padding_share(buckets, num_ranks) <= 0.05
    loads = [0] * num_ranks
    cut = cut_matrices(items, buckets)
    for bucket in buckets:
        for entry in bucket.entries:
            item = items[entry.item]
            if item.count and entry.item not in cut:
                number = (entry.end - entry.begin) // (item.numel // item.count)
                loads[entry.rank] += number * matmul_flops(item.rows, item.cols)
    assert max(loads) * num_ranks / sum(loads) <= 1.10
    # What is cut travels for Newton-Schulz, in 2 bytes there and back, beside 8 bytes of gradients and weights.
    travelling = sum(items[i].numel for i in cut)
    assert 4 * travelling <= 0.05 * 8 * (num_ranks - 1) * sum(item.numel for item in items)


@given(
    st.lists(
        st.one_of(
            st.integers(1, 5000).map(Item),
            st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)).map(
                lambda s: item_of(s, has_matrices=True, is_stack=True)
            ),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 9),
    st.integers(1, 8000),
)
@settings(max_examples=150, deadline=None)
def test_every_element_lies_in_one_place(items, num_ranks, bucket_numel) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for bucket in plan_buckets(items, num_ranks, bucket_numel):
        places: Counter[tuple[int, int]] = Counter()
        held = 0
        for entry in bucket.entries:
            assert 0 <= entry.offset <= entry.offset + entry.end - entry.begin <= bucket.slot
            for i in range(entry.begin, entry.end):
                seen[entry.item, i] += 1
            for i in range(entry.end - entry.begin):
                places[entry.rank, entry.offset + i] += 1
            held += entry.end - entry.begin
        assert all(count == 1 for count in places.values())
        assert bucket.padding == bucket.slot * num_ranks - held
    assert seen == Counter({(k, i): 1 for k, item in enumerate(items) for i in range(item.numel)})


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_parts_of_a_parameter_on_a_rank_are_neighbours(counts, num_ranks) -> None:
    """A rank's part of a stack is one slice of its slot, whichever experts it has."""
    items = [item_of((count, 3, 5), has_matrices=True, is_stack=True) for count in counts]
    for bucket in plan_buckets(items, num_ranks, 400):
        ends: dict[tuple[int, int], int] = {}
        for entry in bucket.entries:
            key = entry.item, entry.rank
            assert ends.get(key, entry.offset) == entry.offset
            ends[key] = entry.offset + entry.end - entry.begin


def test_is_deterministic_and_cuts_only_where_it_must() -> None:
    items = ZOO["124m"]
    assert plan_buckets(items, 8, BUCKET) == plan_buckets(items, 8, BUCKET)
    assert cut_matrices(items, plan_buckets(items, 8, BUCKET)) == set()
    one = [item_of((8, 8), has_matrices=True, is_stack=False)]
    assert cut_matrices(one, plan_buckets(one, 2, BUCKET)) == {0}
