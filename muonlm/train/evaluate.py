"""Validation loss on a fixed set of held-out sequences, the same on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from muonlm.data.dataset import TokenDataset
from muonlm.dist import collectives
from muonlm.dist.mesh import Mesh
from muonlm.dist.wrap import free_gathered


def eval_indices(num_sequences: int, seq_len: int, tokens: int) -> np.ndarray:
    """Indices (int64, ascending) of the sequences that make up `tokens`: evenly spread over the split.

    At least one sequence, and never more than there are.
    """
    count = min(max(tokens // seq_len, 1), num_sequences)
    return np.arange(count, dtype=np.int64) * num_sequences // count


def rank_batches(indices: np.ndarray, rank: int, size: int, batch_size: int) -> list[np.ndarray]:
    """This rank's share of `indices` in batches; every rank gets the same number of batches.

    Shares differ by at most one sequence. A rank that has none left gets an empty batch, so that collectives inside
    the model still meet.
    """
    share = np.array_split(indices, size)[rank]
    num_batches = math.ceil(math.ceil(len(indices) / size) / batch_size)
    return [share[i * batch_size : (i + 1) * batch_size] for i in range(num_batches)]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: TokenDataset,
    indices: np.ndarray,
    *,
    batch_size: int,
    mesh: Mesh,
    dtype: torch.dtype,
) -> float:
    """Mean next-token cross-entropy in nats over the sequences at `indices`, exact over ranks.

    `model` is the bare model: forward passes communicate nothing unless it is sharded; then one all_reduce of two fp64
    numbers.
    """
    device = mesh.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for share in rank_batches(indices, mesh.data_rank, mesh.data_size, batch_size):
        # An empty share runs one sequence that does not count.
        tokens = torch.from_numpy(dataset.sequences(share if len(share) else indices[:1])).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        total += torch.stack([loss.double() * len(share), torch.tensor(len(share), device=device).double()])
    model.train()
    free_gathered(model)
    # Ranks of one tensor group count the same sequences, all of them as often.
    loss_sum, count = collectives.all_reduce(total).tolist()
    return float(loss_sum / count)
