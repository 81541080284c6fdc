"""Who computes what: balance, sharing, pinning, and that every rank comes to the same answer."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.optim.assign import Job, assign, reduction_price, shared_bytes, shared_flops
from muonlm_kernels import matmul_flops

NEVER = 2**63

jobs_of = st.lists(
    st.builds(Job, st.sampled_from([1, 16, 64, 300, 700]), st.sampled_from([8, 64, 512, 900])), min_size=1, max_size=20
)


@settings(max_examples=60, deadline=None)
@given(jobs_of, st.integers(1, 9), st.sampled_from([0, 10**7, NEVER]))
def test_loads_are_those_of_the_workers(jobs: list[Job], ranks: int, split_min_flops: int) -> None:
    result = assign(jobs, ranks, split_min_flops=split_min_flops)
    loads = [0] * ranks
    for job, team in zip(jobs, result.workers, strict=True):
        assert team
        assert list(team) == sorted(set(team))
        assert len(team) <= max(job.rows, job.cols)
        if len(team) > 1:
            assert matmul_flops(job.rows, job.cols) >= split_min_flops
        for rank in team:
            loads[rank] += shared_flops(job.rows, job.cols, len(team))
    assert tuple(loads) == result.loads_flops
    assert assign(jobs, ranks, split_min_flops=split_min_flops) == result


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([256, 300, 400, 512, 700, 1000]), min_size=1, max_size=9), st.integers(2, 9))
def test_sharing_makes_the_slowest_rank_faster_reductions_included(sizes: list[int], ranks: int) -> None:
    jobs, threshold = [Job(size, size) for size in sizes], matmul_flops(250, 250)
    result = assign(jobs, ranks, split_min_flops=threshold)
    loads = [0.0] * ranks
    for job, team in zip(jobs, result.workers, strict=True):
        reductions = reduction_price(threshold) * shared_bytes(job.rows, job.cols, len(team))
        for rank in team:
            loads[rank] += shared_flops(job.rows, job.cols, len(team)) + reductions
    alone = max(assign(jobs, ranks, split_min_flops=NEVER).loads_flops)
    if any(len(team) > 1 for team in result.workers):
        assert max(loads) < 0.995 * alone


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 3))
def test_without_sharing_no_load_exceeds_grahams_bound(sizes: list[int], ranks: int) -> None:
    jobs = [Job(16 * size, 16 * size) for size in sizes]
    costs = [matmul_flops(job.rows, job.cols) for job in jobs]
    best = min(
        max(sum(cost for cost, place in zip(costs, places, strict=True) if place == rank) for rank in range(ranks))
        for places in product(range(ranks), repeat=len(jobs))
    )
    assert max(assign(jobs, ranks, split_min_flops=NEVER).loads_flops) <= (4 / 3 - 1 / (3 * ranks)) * best * (1 + 1e-9)


def test_one_rank_computes_everything() -> None:
    result = assign([Job(8, 8), Job(4, 4)], 1, split_min_flops=0)
    assert result.workers == ((0,), (0,))
    assert result.imbalance == 1


def test_heaviest_first_to_the_least_loaded_and_ties_to_the_lower() -> None:
    result = assign([Job(8, 8), Job(16, 16), Job(8, 8), Job(8, 8)], 2, split_min_flops=NEVER)
    assert result.workers == ((1,), (0,), (1,), (1,))


def test_pinned_jobs_stay_with_a_holder_and_the_others_even_it_out() -> None:
    pinned = [Job(64, 64, holders=(2, 3), pinned=True)] * 4
    result = assign([*pinned, *[Job(64, 64)] * 4], 4, split_min_flops=NEVER)
    assert [len(team) for team in result.workers] == [1] * 8
    assert {team[0] for team in result.workers[:4]} == {2, 3}
    assert result.imbalance == 1


def test_a_holder_is_preferred_where_that_balances_too() -> None:
    held = [Job(64, 64, holders=(rank,)) for rank in (3, 2, 1, 0)]
    assert assign(held, 4, split_min_flops=NEVER).workers == ((3,), (2,), (1,), (0,))
    # All on one rank would not balance: then the holders do not matter.
    one_sided = [Job(64, 64, holders=(3,))] * 4
    assert assign(one_sided, 4, split_min_flops=NEVER).imbalance == 1


def test_pinned_jobs_are_never_shared_and_do_not_keep_others_from_it() -> None:
    jobs = [Job(512, 512, holders=(0,), pinned=True), Job(1024, 1024)]
    result = assign(jobs, 4, split_min_flops=0)
    assert result.workers[0] == (0,)
    assert len(result.workers[1]) > 1
    assert 0 not in result.workers[1]


def test_few_ranks_share_the_heavy_matrix_and_the_light_ones_stay_whole() -> None:
    result = assign([Job(1024, 1024), *[Job(256, 256)] * 8], 4, split_min_flops=10**7)
    heavy, light = result.workers[0], result.workers[1:]
    assert len(heavy) > 1
    assert all(len(team) == 1 for team in light)
    assert result.imbalance < 1.25


def test_a_reduction_has_its_price() -> None:
    """At `split_min_flops` sharing a square matrix by two is worth nothing."""
    m = 640
    flops = matmul_flops(m, m)
    cost = shared_flops(m, m, 2) + reduction_price(flops) * shared_bytes(m, m, 2)
    assert cost == pytest.approx(flops)
    assert reduction_price(0) == 0


def test_sharing_stops_where_reductions_cost_more_than_they_save() -> None:
    jobs = [Job(512, 512)]
    flops = matmul_flops(512, 512)
    assert len(assign(jobs, 64, split_min_flops=flops // 1000).workers[0]) > len(
        assign(jobs, 64, split_min_flops=flops // 8).workers[0]
    )
    assert assign(jobs, 64, split_min_flops=flops + 1).workers == ((0,),)


@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (64, 256), (256, 64)])
def test_shared_flops_fall_with_the_team_and_start_at_the_dense_count(rows: int, cols: int) -> None:
    counts = [shared_flops(rows, cols, size) for size in (1, 2, 4, 8, 64)]
    assert counts[0] == matmul_flops(rows, cols)
    assert counts == sorted(counts, reverse=True)
    # Each rank of the team: X X^T and A X on its columns, and the cheaper form of A^2 X.
    m, part = 64, max(rows, cols) // 4
    assert counts[2] == 5 * (4 * m * m * part + 2 * m * m * min(m, part))
