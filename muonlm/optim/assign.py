"""Who orthogonalizes which matrix: a pure function of shapes, holders and the number of ranks."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

# Where the reductions between ranks that share a matrix cost as much as the sharing saves: see `reduction_price`.
SPLIT_MIN_FLOPS = 10**9
_GOOD_IMBALANCE = 1.05
_LIMITS_TRIED = 24
# Another limit replaces the best so far only where it is worth more groups and reductions.
_WORTHWHILE = 0.99


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

    A step is 4 m^2 n / g for X X^T and A X, and the cheaper of A A and A (A X): see `muonlm.optim.shared`. With one
    worker that is `muonlm_kernels.matmul_flops`, which is not imported here as it brings torch with it.
    """
    m, n = sorted((rows, cols))
    part = -(-n // num_workers)
    return steps * (4 * m * m * part + 2 * m * m * min(m, part))


def shared_bytes(rows: int, cols: int, num_workers: int, steps: int = 5) -> int:
    """Bytes that each of `num_workers` ranks sends to share a matrix: an all_reduce of m^2 fp32 numbers a step."""
    return steps * 2 * (num_workers - 1) * 4 * min(rows, cols) ** 2 // num_workers


def reduction_price(split_min_flops: int, steps: int = 5) -> float:
    """FLOPs that a byte of a reduction is worth, if sharing a square matrix of `split_min_flops` saves nothing.

    Two ranks that share an m x m matrix of 6 m^3 FLOPs a step save 3 m^3 each, and send 4 m^2 bytes.
    """
    return 3 / 4 * math.cbrt(split_min_flops / (6 * steps))


def assign(jobs: Sequence[Job], num_ranks: int, steps: int = 5, split_min_flops: int = SPLIT_MIN_FLOPS) -> Assignment:
    """Longest-processing-time assignment over `num_ranks` ranks: heaviest job first, each to the least loaded rank.

    Pinned jobs come first, each to its least loaded holder. Others go to a holder too where that makes the largest
    load no more than 5 % larger. Where whole matrices cannot balance the ranks, as with more ranks than matrices,
    a limit is put on the loads, and a matrix of at least `split_min_flops` that would exceed it is shared by the fewest
    ranks that stay below it, at the price of its reductions; of several limits the highest is taken that balances, else
    the one with the least largest load. Deterministic: ties fall to the lower index and the lower rank. Without
    sharing, and with free choice, the largest load is at most 4/3 of the optimum (R. Graham, "Bounds on multiprocessing
    timing anomalies", 1969).
    """
    flops = [shared_flops(job.rows, job.cols, 1, steps) for job in jobs]
    pinned = [job.pinned for job in jobs]
    pack = partial(_pack, jobs, flops, num_ranks, steps, split_min_flops)
    freely = _order(flops, pinned)
    best, high = pack(freely, pinned) or _NOTHING
    if any(job.holders and not job.pinned for job in jobs):
        bound = [bool(job.pinned or job.holders) for job in jobs]
        local, highest = pack(_order(flops, bound), bound, give_up=_GOOD_IMBALANCE * high) or _NOTHING
        if highest <= _GOOD_IMBALANCE * high:
            best, high = local, highest
    if best.imbalance <= _GOOD_IMBALANCE:
        return best
    mean, most = sum(best.loads_flops) / num_ranks, high
    for number in reversed(range(_LIMITS_TRIED)):
        limit = mean * (most / mean) ** (number / _LIMITS_TRIED)
        tried = pack(freely, pinned, limit, give_up=_WORTHWHILE * high)
        if tried is not None and tried[1] < _WORTHWHILE * high:
            best, high = tried
            if high <= _GOOD_IMBALANCE * mean:
                break
    return best


def _order(flops: list[int], bound: list[bool]) -> list[int]:
    """Jobs of given ranks, then the others, by falling cost."""
    return sorted(range(len(flops)), key=lambda i: (not bound[i], -flops[i], i))


_NOTHING = Assignment((), ()), math.inf


def _pack(
    jobs: Sequence[Job],
    flops: list[int],
    num_ranks: int,
    steps: int,
    split_min_flops: int,
    order: list[int],
    bound: list[bool],
    limit: float = math.inf,
    give_up: float = math.inf,
) -> tuple[Assignment, float] | None:
    """Greedy, in `order`: `bound` jobs to one of their holders, and the others to the least loaded ranks.

    What may not be shared raises the limit where it must. The second value is the largest load, reductions included.
    None where a job can neither fit nor be shared, or a load exceeds `give_up`.
    """
    price = reduction_price(split_min_flops, steps)
    loads, loads_flops = [0.0] * num_ranks, [0] * num_ranks
    workers: list[tuple[int, ...]] = [()] * len(jobs)
    heap: list[tuple[float, int]] = []
    for index in order:
        job = jobs[index]
        if not bound[index] and not heap:  # bound jobs come first: from here on the heap alone decides
            heap = sorted((load, rank) for rank, load in enumerate(loads))
        if bound[index]:
            team = [min(job.holders, key=lambda rank: (loads[rank], rank))]
        elif heap[0][0] + flops[index] <= limit or flops[index] < split_min_flops:
            team = [heapq.heappop(heap)[1]]
        else:
            team = _team(job, heap, steps, price, limit)
        if not team:
            return None
        part, cost = _cost(job.rows, job.cols, len(team), steps, price)
        for rank in team:
            load = loads[rank] = loads[rank] + cost
            loads_flops[rank] += part
            if load > give_up:
                return None
            if load > limit:
                limit = load
            if heap:
                heapq.heappush(heap, (load, rank))
        workers[index] = tuple(sorted(team)) if len(team) > 1 else (team[0],)
    return Assignment(tuple(workers), tuple(loads_flops)), max(loads)


def _team(job: Job, heap: list[tuple[float, int]], steps: int, price: float, limit: float) -> list[int]:
    """The fewest least loaded ranks, popped from the heap, that can share `job` under `limit`; none if none can."""
    team: list[int] = []
    for size in range(1, min(len(heap), max(job.rows, job.cols)) + 1):
        load, rank = heapq.heappop(heap)
        team.append(rank)
        if load + _cost(job.rows, job.cols, size, steps, price)[1] <= limit:
            return team
        if load >= limit:
            break
    return []


@lru_cache(maxsize=2**16)
def _cost(rows: int, cols: int, num_workers: int, steps: int, price: float) -> tuple[int, float]:
    """FLOPs of each rank that shares a matrix, and these with its reductions. There are few shapes, and many jobs."""
    part = shared_flops(rows, cols, num_workers, steps)
    return part, part + price * shared_bytes(rows, cols, num_workers, steps)
