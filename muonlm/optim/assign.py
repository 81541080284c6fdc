"""Who orthogonalizes which matrix: a pure function of shapes, holders and the number of ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from muonlm_kernels import matmul_flops

# Below this many FLOPs of one matrix, the reductions between ranks that share it cost more than the sharing saves.
SPLIT_MIN_FLOPS = 10**9
_GOOD_IMBALANCE = 1.05
_LIMITS_TRIED = 24


@dataclass(frozen=True)
class Job:
    """A matrix to be orthogonalized.

    Fields:
        rows, cols: its shape.
        holders: ranks that hold all of it, when that is worth something; empty when everything travels anyhow.
        pinned: it must be computed by a holder, so that nothing of it travels.
    """

    rows: int
    cols: int
    holders: tuple[int, ...] = ()
    pinned: bool = False


@dataclass(frozen=True)
class Assignment:
    """The ranks that compute each job, in job order (several ranks share one matrix), and each rank's FLOPs."""

    workers: tuple[tuple[int, ...], ...]
    loads_flops: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """Largest load over mean load; 1 is perfect."""
        total = sum(self.loads_flops)
        return max(self.loads_flops) * len(self.loads_flops) / total if total else 1.0


def shared_flops(rows: int, cols: int, num_workers: int, steps: int = 5) -> int:
    """FLOPs of each of `num_workers` ranks that share a matrix, each holding a part of its longer side.

    A step is 4 m^2 n / g for X X^T and A X, and the cheaper of A A and A (A X): see `muonlm.optim.shared`.
    """
    if num_workers == 1:
        return matmul_flops(rows, cols, steps)
    m, n = sorted((rows, cols))
    part = -(-n // num_workers)
    return steps * (4 * m * m * part + 2 * m * m * min(m, part))


def assign(jobs: Sequence[Job], num_ranks: int, steps: int = 5, split_min_flops: int = SPLIT_MIN_FLOPS) -> Assignment:
    """Longest-processing-time assignment over `num_ranks` ranks: heaviest job first, each to the least loaded rank.

    Pinned jobs come first, each to its least loaded holder. Others go to a holder too where that makes the largest
    load no more than 5 % larger. Where whole matrices cannot balance the ranks, as with more ranks than matrices,
    matrices of at least `split_min_flops` are shared by as many ranks as bring the largest load down. Deterministic:
    ties fall to the lower index and the lower rank. Without sharing, and with free choice, the largest load is at most
    4/3 of the optimum (R. Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    whole = [1] * len(jobs)
    free = _pack(jobs, whole, num_ranks, steps, use_holders=False)
    if any(job.holders and not job.pinned for job in jobs):
        local = _pack(jobs, whole, num_ranks, steps, use_holders=True)
        if max(local.loads_flops) <= _GOOD_IMBALANCE * max(free.loads_flops):
            free = local
    best = free
    if best.imbalance <= _GOOD_IMBALANCE:
        return best
    mean, high = sum(free.loads_flops) / num_ranks, max(free.loads_flops)
    for number in range(_LIMITS_TRIED):
        limit = mean * (high / mean) ** (number / _LIMITS_TRIED)
        counts = [_num_workers(job, limit, num_ranks, steps, split_min_flops) for job in jobs]
        if counts == whole:
            break
        tried = _pack(jobs, counts, num_ranks, steps, use_holders=False)
        if max(tried.loads_flops) < max(best.loads_flops):
            best = tried
    return best


def _num_workers(job: Job, limit: float, num_ranks: int, steps: int, split_min_flops: int) -> int:
    """The fewest ranks that bring a rank's part of `job` under `limit`; 1 if it may not be shared."""
    if job.pinned or matmul_flops(job.rows, job.cols, steps) < max(split_min_flops, limit):
        return 1
    most = min(num_ranks, max(job.rows, job.cols))
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if shared_flops(job.rows, job.cols, middle, steps) <= limit else (middle + 1, high)
    return low


def _pack(jobs: Sequence[Job], counts: list[int], num_ranks: int, steps: int, *, use_holders: bool) -> Assignment:
    """Greedy: pinned jobs, then the others by falling cost of a rank's part."""
    costs = [shared_flops(job.rows, job.cols, count, steps) for job, count in zip(jobs, counts, strict=True)]
    loads = [0] * num_ranks
    workers: list[tuple[int, ...]] = [()] * len(jobs)

    def is_bound(job: Job) -> bool:
        return job.pinned or (use_holders and bool(job.holders))

    order = sorted(range(len(jobs)), key=lambda i: (not is_bound(jobs[i]), -costs[i], i))
    heap: list[tuple[int, int]] = []
    for index in order:
        job = jobs[index]
        if is_bound(job):
            chosen = [min(job.holders, key=lambda rank: (loads[rank], rank))]
        else:
            if not heap:  # bound jobs come first: from here on the heap alone decides
                heap = sorted((load, rank) for rank, load in enumerate(loads))
            chosen = [heapq.heappop(heap)[1] for _ in range(counts[index])]
            for rank in chosen:
                heapq.heappush(heap, (loads[rank] + costs[index], rank))
        for rank in chosen:
            loads[rank] += costs[index]
        workers[index] = tuple(sorted(chosen))
    return Assignment(tuple(workers), tuple(loads))
