"""What a Muon step costs between ranks, in closed form: the formulas that counts are held against.

P elements of b bytes lie on S shards and R replicas, D = R S ranks in all. Bytes are those that a rank sends, averaged
over the ranks; an all_gather is that of a ring. What shared matrices add: `muonlm.optim.assign.shared_bytes`.
"""

from __future__ import annotations

import math


def exchange_bytes(numel: int, element_bytes: int, *, shards: int, replicas: int = 1) -> float:
    """Mean bytes that a rank sends for `numel` elements: to the owner and back.

    An owner is sent what it does not hold of a matrix, (1 - 1 / S) of it, and sends every rank its part of the result,
    R copies less what it holds itself, so P b ((1 - 1 / S) + (R - 1 / S)) / D. That is 2 (D - 1) / D^2 P b for one
    replica (FSDP2, tensor parallelism, both), and (D - 1) / D P b where every rank holds everything (S = 1): then
    nothing needs to be gathered.
    """
    ranks = shards * replicas
    return numel * element_bytes * ((1 - 1 / shards) + (replicas - 1 / shards)) / ranks


def most_collectives(total_bytes: float, bucket_bytes: int) -> int:
    """Collectives that a step may take at most: two for each bucket of the whole, and two that all ranks agree by."""
    return 2 * math.ceil(total_bytes / bucket_bytes) + 2
