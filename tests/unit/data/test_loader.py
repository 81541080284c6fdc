"""The order is a bijection for every size, well mixed, a function of (seed, n) alone; batches are shifted pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.data.dataset import open_split
from muonlm.data.loader import BatchOrder, batch


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    found = BatchOrder(n, seed).indices(epoch * n, n)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


def test_every_small_size() -> None:
    for n in range(1, 400):
        assert len(set(BatchOrder(n, 3).indices(0, n).tolist())) == n


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 300), cuts=st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_any_cut_of_the_stream_gives_the_same_stream(n: int, cuts: list[int]) -> None:
    order = BatchOrder(n, 5)
    ends = np.cumsum([0, *cuts])
    parts = [order.indices(int(start), count) for start, count in zip(ends[:-1], cuts, strict=True)]
    assert np.array_equal(np.concatenate(parts), BatchOrder(n, 5).indices(0, int(ends[-1])))


def test_order_is_fixed_for_ever() -> None:
    """Saved cursors mean something only as long as these numbers stay."""
    assert BatchOrder(1000, 0).indices(0, 8).tolist() == FIXED[0]
    assert BatchOrder(10**9 + 7, 42).indices(10**9, 10).tolist() == FIXED[1]


FIXED = [
    [20, 871, 676, 772, 739, 616, 589, 488],
    [637853507, 668869454, 537228918, 906850965, 601915818, 403396112, 458737793, 297895283, 529599411, 127172004],
]


def test_epochs_and_seeds_differ() -> None:
    n = 2000
    orders = [BatchOrder(n, 0).indices(0, n), BatchOrder(n, 0).indices(n, n), BatchOrder(n, 1).indices(0, n)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(orders[one] == orders[other]) < 0.01


def test_well_mixed() -> None:
    n, bins = 4096, 16
    table = np.zeros((bins, bins))
    for seed in range(50):
        found = BatchOrder(n, seed).indices(0, n)
        np.add.at(table, (np.arange(n) * bins // n, found * bins // n), 1)
        assert abs(np.corrcoef(np.arange(n), found)[0, 1]) < 0.08  # 5 sigma of 1/sqrt(n)
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.08
        assert np.sum(np.abs(np.diff(found)) == 1) < 20  # 2 expected
    expected = n * 50 / bins**2
    chi2 = np.sum((table - expected) ** 2 / expected)
    dof = (bins - 1) ** 2
    assert abs(chi2 - dof) < 5 * np.sqrt(2 * dof)


def test_each_small_permutation_slot_is_uniform() -> None:
    """Position 0 of n = 7 over many epochs: each sequence comes first equally often."""
    first = BatchOrder(7, 1).indices(0, 7 * 7000).reshape(-1, 7)[:, 0]
    counts = np.bincount(first, minlength=7)
    assert np.sum((counts - 1000) ** 2 / 1000) < 30  # chi-square, 6 degrees of freedom: p < 1e-4


def test_huge_sizes_cost_nothing() -> None:
    order = BatchOrder(10**12, 0)
    found = order.indices(5 * 10**12 - 8, 16)
    assert len(set(found[:8].tolist())) == 8
    assert 0 <= found.min() <= found.max() < 10**12


def test_empty_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BatchOrder(0, 0)


def test_batch_is_shifted_and_follows_the_order(prepared: Path) -> None:
    dataset = open_split(prepared, "train", 64)
    order = BatchOrder(dataset.num_sequences, 9)
    start = dataset.num_sequences - 5
    inputs, labels = batch(dataset, order, start, 12)
    assert inputs.shape == labels.shape == (12, 64)
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.is_contiguous()
    assert labels.is_contiguous()
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    wanted = dataset.sequences(order.indices(start, 12))
    assert np.array_equal(inputs.numpy(), wanted[:, :-1])
    assert np.array_equal(labels[:, -1].numpy(), wanted[:, -1])
    halves = [batch(dataset, order, start, 6), batch(dataset, order, start + 6, 6)]
    assert torch.equal(torch.cat([half[0] for half in halves]), inputs)
