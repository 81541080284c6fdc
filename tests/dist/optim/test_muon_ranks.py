"""Muon on real gloo ranks against one process: same updates, one collective a step, one clear error."""

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.optim.muon import Muon

SHAPES = [(32, 32), (32, 32), (96, 32), (32, 96), (17, 33), (1, 8), (32, 32)]


def train(shapes: list[tuple[int, int]], dtype: torch.dtype, steps: int = 3) -> tuple[list[torch.Tensor], dict]:
    """Three steps with gradients that are the same on every rank, as DDP leaves them."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]
    table = nn.Parameter(torch.ones(5, 3))
    optimizer = Muon([{"params": params}, {"params": [table], "rule": "adamw"}], lr=0.05, dtype=dtype)
    collectives.reset_counters()
    for _ in range(steps):
        for param in [*params, table]:
            param.grad = torch.randn(param.shape, generator=generator) + param.detach()
        optimizer.step()
    state = [optimizer.state[p]["momentum_buffer"] for p in params]
    return [p.detach() for p in [*params, table]] + state, dict(collectives.counters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_equals_one_process_bit_for_bit(run_ranks, world_size, dtype):
    expected, counts = train(SHAPES, dtype)
    assert counts == {}
    for tensors, counted in run_ranks(lambda rank, size: train(SHAPES, dtype), world_size):
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
        assert counted["all_gather"]["calls"] == 3
        assert "all_to_all" not in counted  # the updates are everywhere


def test_more_ranks_than_matrices(run_ranks):
    expected, _ = train([(16, 24)], torch.bfloat16)
    for tensors, _ in run_ranks(lambda rank, size: train([(16, 24)], torch.bfloat16), 3):
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_bytes_are_the_updates_split_over_ranks(run_ranks):
    shapes = [(32, 64)] * 8
    for _, counted in run_ranks(lambda rank, size: train(shapes, torch.bfloat16, steps=1), 2):
        assert counted["all_gather"]["bytes"] == 4 * 32 * 64 * 2


def test_work_is_split(run_ranks, monkeypatch):
    """Each rank orthogonalizes only what it owns."""
    import muonlm.optim.muon as module

    counts = []
    original = module.newton_schulz
    monkeypatch.setattr(module, "newton_schulz", lambda x, **kw: counts.append(x.shape[0]) or original(x, **kw))

    def count(rank: int, size: int) -> int:
        train([(16, 16)] * 6, torch.float32, steps=1)
        return sum(counts)

    assert run_ranks(count, 3) == [2, 2, 2]


def test_ranks_with_different_models_refuse_together(run_ranks):
    def differ(rank: int, size: int) -> str:
        with pytest.raises(UserError) as error:
            train([(16, 16), (16, 24 if rank == 1 else 16)], torch.float32)
        return str(error.value)

    messages = run_ranks(differ, 2, timeout_s=30)
    assert messages[0] == messages[1]
    assert "the optimizers of rank 1 and rank 0 differ" in messages[0]
    assert "rank 0 has group 0, number 1 under muon, (1, 16, 16) replicated" in messages[0]


def test_ddp_training_equals_one_process(run_ranks):
    """Averaged gradients of halves of a batch give the step of the whole batch, up to the order of fp32 sums."""

    def run(rank: int, size: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(12, 24, bias=False), nn.Tanh(), nn.Linear(24, 12, bias=False))
        params = list(model.parameters())
        optimizer = Muon(params, lr=0.02, dtype=torch.float32)
        if size > 1:
            model = nn.parallel.DistributedDataParallel(model)
        generator = torch.Generator().manual_seed(1)
        for _ in range(10):
            batch = torch.randn(12, 12, generator=generator)
            share = batch.chunk(size)[rank]
            optimizer.zero_grad()
            (model(share) - share).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in params]

    expected = run(0, 1)
    for size in (2, 3):
        ranks = run_ranks(run, size)
        for tensors in ranks:
            for mine, first, alone in zip(tensors, ranks[0], expected, strict=True):
                assert torch.equal(mine, first)
                torch.testing.assert_close(mine, alone, atol=2e-5, rtol=1e-4)
