"""The counter of collectives against what is known to be sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from muonlm.bench.wire import WireCounter
from muonlm.dist import collectives


def test_bytes_on_a_ring(run_ranks) -> None:
    def run(rank: int, size: int) -> dict[str, tuple[int, int]]:
        x = torch.ones(12)
        with WireCounter() as counter:
            dist.all_reduce(x.clone())
            dist.all_reduce(x.clone(), op=dist.ReduceOp.MAX)
            dist.all_gather_into_tensor(torch.empty(36), x)
            dist.all_gather([torch.empty(12) for _ in range(3)], x)
            dist.reduce_scatter_tensor(torch.empty(4), x)
        assert (counter.calls, counter.bytes) == (5, sum(count["bytes"] for count in counter.counts.values()))
        return {kind: (count["calls"], count["bytes"]) for kind, count in counter.counts.items()}

    for counts in run_ranks(run, 3):
        assert counts == {
            "all_reduce": (2, 2 * 48 * 4 // 3),
            "all_gather": (2, 2 * 48 * 2),
            "reduce_scatter": (1, 48 * 2 // 3),
        }


def test_what_an_all_to_all_keeps_is_not_sent(run_ranks) -> None:
    def run(rank: int, size: int) -> list[int]:
        sent = []
        with WireCounter() as counter:
            sizes = [[3, 5], [7, 2]]
            inputs, outputs = sizes[rank], [row[rank] for row in sizes]
            x, out = torch.ones(sum(inputs)), torch.empty(sum(outputs))
            dist.all_to_all_single(out, x, outputs, inputs)
            sent.append(counter.bytes)
            dist.all_to_all_single(torch.empty(6), torch.ones(6))
            sent.append(counter.bytes)
            collectives.start_all_to_all(out, x, outputs, inputs).wait()
            sent.append(counter.bytes)
        return sent

    assert run_ranks(run, 2) == [[20, 32, 52], [28, 40, 68]]


def test_collectives_inside_dtensors_are_seen(run_ranks) -> None:
    def run(rank: int, size: int) -> tuple[int, int]:
        tensor = distribute_tensor(torch.ones(8, 4), init_device_mesh("cpu", (size,)), [Shard(0)])
        with WireCounter() as counter:
            tensor.redistribute(placements=[Replicate()]).to_local().sum()
            explicit = counter.calls, counter.bytes
            _ = tensor @ tensor.T  # gathers the other half by itself
        assert counter.calls > 1
        return explicit

    assert run_ranks(run, 2) == [(1, 64), (1, 64)]


def test_nothing_is_counted_outside(run_ranks) -> None:
    def run(rank: int, size: int) -> int:
        counter = WireCounter()
        with counter:
            pass
        dist.all_reduce(torch.ones(3))
        return counter.calls

    assert run_ranks(run, 2) == [0, 0]


@pytest.mark.parametrize("layout", ["replicated", "fsdp", "tp"])
def test_agrees_with_the_counters_of_this_project(run_ranks, layout: str) -> None:
    def run(rank: int, size: int) -> None:
        from muonlm.bench.placement import make_grid, place
        from muonlm.bench.zoo import gpt
        from muonlm.optim.muon import Muon

        device = torch.device("cpu")
        grid, weights = make_grid(layout, device), gpt(5e4).weights
        params = place(weights, grid, device, seed=0, std=0.02)
        for param, grad in zip(params, place(weights, grid, device, seed=1, std=0.02), strict=True):
            param.grad = grad.detach()
        optimizer = Muon(params, dtype=torch.float32)
        optimizer.step()
        collectives.reset_counters()
        with WireCounter() as counter:
            optimizer.step()
        own = collectives.counters()
        assert sum(count["calls"] for count in own.values()) == counter.calls
        kind = "all_gather" if layout == "replicated" else "all_to_all"
        assert own[kind]["bytes"] == counter.counts[kind]["bytes"]  # two ranks: each sends its part once
        assert own[kind]["bytes"] == sum(optimizer.plan().bytes_sent(rank).values())

    run_ranks(run, 2)
