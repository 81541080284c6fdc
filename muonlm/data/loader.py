"""The order of training data and its batches. One integer, the number of sequences consumed so far, is the whole state.

The order depends on the seed and the number of sequences alone: every optimizer, world size and restart sees the same
global sample k. A rank that trains samples start..start+count of a global batch asks for just those.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from muonlm.data.dataset import TokenDataset

NUM_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class BatchOrder:
    """Sequence indices in a new pseudo-random order each epoch, in O(1) memory.

    Global sample k is sequence `permutation_e(k mod n)` of epoch e = k div n. The permutation is a generalised Feistel
    network on Z_a x Z_b with a = ceil(sqrt(n)), a*b >= n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002), of 8 rounds with the splitmix64 finaliser keyed by (seed, epoch, round); values >= n are mapped again until
    they fall below n (cycle walking), which keeps it a bijection for every n.
    """

    def __init__(self, num_sequences: int, seed: int) -> None:
        if num_sequences < 1:
            raise ValueError(f"num_sequences is {num_sequences}; an order needs at least one sequence")
        self.num_sequences = num_sequences
        self.seed = seed
        root = math.isqrt(num_sequences - 1) + 1
        self._left, self._right = np.uint64(root), np.uint64(-(-num_sequences // root))

    def indices(self, start: int, count: int) -> np.ndarray:
        """Dataset indices, int64 (count,), of the global samples start..start+count; may span epochs."""
        epoch, within = np.divmod(np.arange(start, start + count, dtype=np.int64), self.num_sequences)
        keys = _mix(_mix(np.uint64(self.seed)) + epoch.astype(np.uint64) * _GOLDEN)
        values = self._permute(within.astype(np.uint64), keys)
        while len(outside := np.flatnonzero(values >= self.num_sequences)):
            values[outside] = self._permute(values[outside], keys[outside])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._right)
        for number in range(0, NUM_ROUNDS, 2):
            left = (left + _mix(keys + right * _GOLDEN + np.uint64(number)) % self._left) % self._left
            right = (right + _mix(keys + left * _GOLDEN + np.uint64(number + 1)) % self._right) % self._right
        return left * self._right + right


def _mix(values: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64's finaliser: a bijection of 64-bit words in which every input bit moves half of the output bits."""
    mixed = np.atleast_1d(values)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def batch(dataset: TokenDataset, order: BatchOrder, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Global samples start..start+count as (input_ids_BT, labels_BT): int64, contiguous, on the CPU.

    labels_BT[b, t] is the token after input_ids_BT[b, t].
    """
    sequences = torch.from_numpy(dataset.sequences(order.indices(start, count)))
    return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
