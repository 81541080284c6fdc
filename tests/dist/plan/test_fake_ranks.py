"""The forecast against FSDP2 itself on 1024 ranks that do not exist: torch's fake process group and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muonlm.bench.wire import WireCounter
from muonlm.config.schema import TrainConfig
from muonlm.dist.mesh import make_mesh
from muonlm.dist.process import World
from muonlm.dist.wrap import wrap
from muonlm.model.gpt import GPT
from muonlm.optim.build import build_optimizer
from muonlm.optim.shards import local_tensor
from muonlm.plan.forecast import forecast
from muonlm.plan.hardware import DEVICES, Machines

VOCAB_SIZE = 4096


def make(spread: dict[str, Any]) -> TrainConfig:
    model = {"kind": "gpt", "num_layers": 4, "hidden_size": 1024, "intermediate_size": 2816, "num_heads": 16}
    return TrainConfig.model_validate(
        {
            "name": "fake",
            "data": {"path": "x", "seq_len": 64},
            "model": model,
            "optim": {"kind": "muon", "newton_schulz": {"dtype": "float32"}},
            "loop": {"steps": 100, "batch_size": 1024, "precision": "float32", "device": "cpu"},
            "dist": {"zero": 3, **spread},
        }
    )


def fake_step(config: TrainConfig, world_size: int, rank: int) -> dict[str, Any]:
    """Forward and backward pass of one rank, and what its optimizer keeps and would do."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        # Outside of the mode, which would make the mesh's own numbers fake.
        mesh = make_mesh(config, World(rank, world_size, 0, torch.device("cpu"), "fake"))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            model = GPT(config.model, VOCAB_SIZE)
            wrapped = wrap(model, model.blocks, mesh)
        optimizer = build_optimizer(model, config.optim, iterate_dtype=torch.float32)
        with mode, WireCounter() as wire:
            ids = torch.zeros(1, config.data.seq_len, dtype=torch.int64)
            wrapped(ids, ids).backward()
        params = [local_tensor(p) for p in model.parameters()]
        states = [local_tensor(v) for state in optimizer.state.values() for v in state.values() if v.ndim]
        plan = optimizer.plan()
        return {
            "weights": sum(p.nbytes for p in params),
            "optimizer_state": sum(t.nbytes for t in states),
            "counts": dict(wire.counts),
            "flops_max": max(plan.assignment.loads_flops),
            "num_rounds": plan.num_rounds,
        }
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("spread", [{}, {"replicas": 8}], ids=["fsdp", "hsdp"])
def test_1024_ranks(run_ranks: Callable[..., list[Any]], spread: dict[str, Any]) -> None:
    config = make(spread)
    [real] = run_ranks(lambda rank, size: fake_step(config, 1024, 0), 1, join=False)
    machines = Machines("cpu", DEVICES["cpu"], 8)
    plan = forecast(config, world_size=1024, vocab_size=VOCAB_SIZE, machines=machines)
    assert plan.memory.weights == real["weights"]
    assert plan.memory.optimizer_state == real["optimizer_state"]
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        ours = [t for t in plan.sent if t.collective == kind and not t.is_muons]
        count = real["counts"].get(kind, {"bytes": 0, "calls": 0})
        assert sum(t.num_bytes for t in ours) == pytest.approx(count["bytes"], rel=0.01)
        assert sum(t.calls for t in ours) == count["calls"]
    assert plan.owners.flops_max == real["flops_max"]
    assert plan.owners.num_rounds == real["num_rounds"]
    assert plan.owners.num_shared > 0
