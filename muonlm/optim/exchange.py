"""Orthogonalize a list of matrices that every rank holds whole, splitting the work over the ranks.

One step is one all_gather: each rank orthogonalizes the matrices it owns, packs the results into one flat buffer in
the precision of the iterates, and receives everybody's. Bytes sent per rank on a ring: (D - 1) times the padded
buffer of one rank, about (D - 1) / D of all matrices; padding comes from owners that hold unequal shares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.optim.assign import Assignment, assign_owners

Orthogonalize = Callable[[torch.Tensor], torch.Tensor]


class ReplicatedExchange:
    """Exchange for parameters that are replicated over the ranks (one process, or DDP).

    Built from shapes alone; the ranks compare their plans before the first collective that moves data.
    """

    def __init__(self, shapes: list[tuple[int, int]], steps: int = 5) -> None:
        self.plan: Assignment = assign_owners(shapes, collectives.world_size(), steps)
        self._check_equal_on_all_ranks()

    def run(self, matrices: list[torch.Tensor], orthogonalize: Orthogonalize, dtype: torch.dtype) -> list[torch.Tensor]:
        """Orthogonalize `matrices` (M, N), each on its owner; every rank gets all results, in order.

        `orthogonalize` maps a stack (K, M, N) to the stack of the same shape in `dtype`; it is called once for each
        shape that this rank owns. One all_gather when there is more than one rank, none otherwise.
        """
        shapes = tuple((m.shape[0], m.shape[1]) for m in matrices)
        assert shapes == self.plan.shapes, "the matrices are not those of the plan"
        mine = self.plan.owned_by(collectives.rank())
        results = _by_shape(matrices, mine, orthogonalize)
        if not collectives.is_active():
            return [results[index] for index in range(len(matrices))]
        return self._gather(results, dtype, matrices[0].device)

    def _gather(self, results: dict[int, torch.Tensor], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        num_ranks = collectives.world_size()
        numel = [rows * cols for rows, cols in self.plan.shapes]
        longest = max(sum(numel[i] for i in self.plan.owned_by(rank)) for rank in range(num_ranks))
        send = torch.zeros(longest, dtype=dtype, device=device)
        if results:
            flat = torch.cat([results[i].reshape(-1) for i in sorted(results)])
            send[: flat.numel()] = flat
        received = torch.empty(num_ranks * longest, dtype=dtype, device=device)
        collectives.all_gather_into(received, send)
        out: dict[int, torch.Tensor] = {}
        for rank in range(num_ranks):
            offset = rank * longest
            for index in self.plan.owned_by(rank):
                out[index] = received[offset : offset + numel[index]].view(self.plan.shapes[index])
                offset += numel[index]
        return [out[index] for index in range(len(out))]

    def _check_equal_on_all_ranks(self) -> None:
        plans = collectives.gather_objects((self.plan.digest(), self.plan.shapes))
        for rank, (digest, shapes) in enumerate(plans):
            if digest == plans[0][0]:
                continue
            first = next(
                (i for i, (a, b) in enumerate(zip(plans[0][1], shapes, strict=False)) if a != b),
                min(len(plans[0][1]), len(shapes)),
            )
            raise UserError(
                f"rank {rank} would orthogonalize other matrices than rank 0 ({len(shapes)} against "
                f"{len(plans[0][1])}); the first difference is at matrix {first}. All ranks must build the same model"
            )


def _by_shape(
    matrices: list[torch.Tensor], indices: list[int], orthogonalize: Orthogonalize
) -> dict[int, torch.Tensor]:
    """Orthogonalize the matrices at `indices`, stacked by shape, so that small ones share one batched product."""
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index in indices:
        by_shape[tuple(matrices[index].shape)].append(index)
    results: dict[int, torch.Tensor] = {}
    for members in by_shape.values():
        stack = orthogonalize(torch.stack([matrices[index] for index in members]))
        results.update(zip(members, stack.unbind(0), strict=True))
    return results
