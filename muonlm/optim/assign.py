"""Who orthogonalizes which matrix: a pure function of shapes and the number of ranks."""

from __future__ import annotations

import hashlib
import heapq
import json
from dataclasses import dataclass

from muonlm_kernels import matmul_flops


@dataclass(frozen=True)
class Assignment:
    """Owner of each matrix, in the order of `shapes`, and the Newton-Schulz FLOPs that fall on each rank."""

    shapes: tuple[tuple[int, int], ...]
    owners: tuple[int, ...]
    loads_flops: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """Largest load over mean load; 1 is perfect."""
        total = sum(self.loads_flops)
        return max(self.loads_flops) * len(self.loads_flops) / total if total else 1.0

    def owned_by(self, rank: int) -> list[int]:
        """Indices of the matrices that `rank` owns."""
        return [index for index, owner in enumerate(self.owners) if owner == rank]

    def digest(self) -> str:
        """Hash of the whole assignment, to compare across ranks."""
        return hashlib.sha256(json.dumps([self.shapes, self.owners, len(self.loads_flops)]).encode()).hexdigest()


def assign_owners(shapes: list[tuple[int, int]], num_ranks: int, steps: int = 5) -> Assignment:
    """Longest-processing-time assignment: heaviest matrix first, each to the least loaded rank.

    Deterministic: ties fall to the lower index and the lower rank. The largest load is at most 4/3 of the optimum
    (R. Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    costs = [matmul_flops(rows, cols, steps) for rows, cols in shapes]
    ranks = [(0, rank) for rank in range(num_ranks)]
    owners = [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(ranks)
        owners[index] = rank
        heapq.heappush(ranks, (load + costs[index], rank))
    loads = [0] * num_ranks
    for load, rank in ranks:
        loads[rank] = load
    return Assignment(tuple(shapes), tuple(owners), tuple(loads))
