"""The validation loss is the mean over a fixed set of sequences, however they are dealt to ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from muonlm.config.ranks import RankGrid
from muonlm.config.schema import GPTConfig
from muonlm.data.dataset import open_split
from muonlm.dist import collectives
from muonlm.dist.mesh import Mesh
from muonlm.model.build import build_model
from muonlm.train.evaluate import eval_indices, evaluate, rank_batches


def test_indices_are_spread_over_the_split_and_never_too_many() -> None:
    assert eval_indices(100, 32, 32 * 4).tolist() == [0, 25, 50, 75]
    assert eval_indices(3, 32, 10**6).tolist() == [0, 1, 2]
    assert eval_indices(7, 32, 1).tolist() == [0]


@pytest.mark.parametrize(("count", "size", "batch"), [(7, 3, 2), (1, 4, 3), (8, 2, 4), (13, 5, 1), (9, 4, 2)])
def test_every_rank_has_as_many_batches_and_every_sequence_is_dealt_once(count, size, batch) -> None:
    shares = [rank_batches(np.arange(count), rank, size, batch) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    dealt = np.concatenate([part for share in shares for part in share])
    assert sorted(dealt.tolist()) == list(range(count))
    assert max(len(part) for share in shares for part in share) <= batch


@pytest.mark.parametrize("count", [7, 2])
def test_mean_is_exact_on_any_number_of_ranks(stdlib_data, run_ranks, count) -> None:
    data = open_split(stdlib_data, "validation", 32, "never")
    indices = eval_indices(data.num_sequences, 32, 32 * count)
    config = GPTConfig(num_layers=1, hidden_size=16, intermediate_size=32, num_heads=2, init_std=0.5)
    model = build_model(config, json.loads((stdlib_data / "manifest.json").read_text())["vocab_size"], seed=1)
    tokens = torch.from_numpy(data.sequences(indices))
    with torch.no_grad():
        expected = float(F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).double(), tokens[:, 1:].flatten()))

    def one_rank(rank, size):
        loss = evaluate(
            model,
            data,
            indices,
            batch_size=2,
            mesh=Mesh(RankGrid(size, 1, 1), rank, torch.device("cpu")),
            dtype=torch.float32,
        )
        return loss, collectives.counters().get("all_reduce", {}).get("calls", 0), model.training

    for size in (1, 2, 3):
        for loss, calls, training in run_ranks(one_rank, size):
            assert loss == pytest.approx(expected, rel=1e-6)
            assert calls == (1 if size > 1 else 0)
            assert training
