"""The forecast against what real gloo ranks keep and send in a step of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from muonlm.bench.wire import WireCounter
from muonlm.config.schema import TrainConfig
from muonlm.dist import collectives, process
from muonlm.dist.wrap import without_gradient_sync
from muonlm.optim.shards import local_tensor
from muonlm.optim.zero import ZeroDataParallel
from muonlm.plan.forecast import Forecast, forecast
from muonlm.plan.hardware import DEVICES, Machines
from muonlm.plan.memory import make_model, memory_of
from muonlm.train.setup import build
from muonlm.train.step import take_step

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp 2": (2, {}),
    "ddp 4": (4, {}),
    "zero-1 2": (2, {"zero": 1}),
    "zero-2 4": (4, {"zero": 2}),
    "fsdp 2": (2, {"zero": 3}),
    "fsdp 4": (4, {"zero": 3}),
    "fsdp 4, kept": (4, {"zero": 3, "reshard_after_forward": False}),
    "fsdp 2, bfloat16": (2, {"zero": 3, "gather_dtype": "bfloat16"}),
    "hsdp 2x2": (4, {"zero": 3, "replicas": 2}),
    "tp 2": (2, {"tensor_parallel": 2}),
    "tp x fsdp 2x2": (4, {"zero": 3, "tensor_parallel": 2}),
}
MOE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero-1 2": (2, {"zero": 1}),
    "fsdp 4": (4, {"zero": 3}),
    "ep 2": (2, {"zero": 3, "expert_parallel": 2}),
    "ep 2 x fsdp 2": (4, {"zero": 3, "expert_parallel": 2}),
    "tp 2 x ep 2": (4, {"zero": 3, "expert_parallel": 2, "tensor_parallel": 2}),
}
BATCH = 8
MODEL = {
    "kind": "gpt",
    "num_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_heads": 4,
    "num_kv_heads": 2,
}
MOE = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert_size": 32, "num_layers": 3}


def make(path: Path, spread: dict[str, Any], model: dict[str, Any] | None = None, **loop: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "name": "tiny",
            "data": {"path": str(path), "seq_len": 32},
            "model": MODEL | (model or {}),
            "optim": {"kind": "muon", "newton_schulz": {"dtype": "float32"}},
            "schedule": {"warmup_steps": 1},
            "loop": {"steps": 4, "batch_size": BATCH, "threads": 1, "precision": "float32", "device": "cpu"} | loop,
            "dist": spread,
        }
    )


def nbytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def one_step(config: TrainConfig) -> dict[str, Any]:
    """What this rank keeps, and sends in the second step: in the first, plans are compared and groups made."""
    parts = build(config, process.start(config.dist, "cpu"), {})
    if isinstance(parts.wrapped, DistributedDataParallel):
        parts.wrapped.register_comm_hook(None, allreduce_hook)  # the same, but not from C++, where no counter sees it
    take_step(parts, 0, 0, measure=False, stop=False)
    params = [local_tensor(p) for p in parts.model.parameters()]
    engine = parts.wrapped if isinstance(parts.wrapped, ZeroDataParallel) else None
    kept = params + ([bucket.values for bucket in engine._buckets] if engine else [])
    states = [local_tensor(v) for state in parts.optimizer.state.values() for v in state.values() if v.ndim]
    found = {"weights": nbytes(kept), "optimizer_state": sum(t.nbytes for t in states)}

    exchange, update = WireCounter(), parts.optimizer._muon_step

    def counted_update() -> None:
        shards = [shard for group in parts.optimizer.param_groups for shard in parts.optimizer.shards(group)]
        grads = [grad for shard in shards if (grad := shard.grad()) is not None]
        found["gradients"] = nbytes(grads) if engine else sum(grad.nbytes for grad in grads)
        with exchange:
            update()

    parts.optimizer._muon_step = counted_update  # type: ignore[method-assign]
    collectives.reset_counters()
    with WireCounter() as wire:
        take_step(parts, 1, BATCH, measure=False, stop=False)
    size = dist.get_world_size()
    ring = 2 * (size - 1) / size  # of an all_reduce
    counts = collectives.counters()
    return found | {
        "exchange": exchange.bytes,
        "exchange_calls": exchange.calls - _num_empty(counts),
        # what ranks agree on is counted under "all_reduce", and no forecast
        "sent": wire.bytes - ring * counts["all_reduce"]["bytes"],
        "calls": wire.calls - counts["all_reduce"]["calls"] - _num_empty(counts),
        "by_kind": {kind: count["bytes"] for kind, count in wire.counts.items()},
        "counts": counts,
        "loads": parts.optimizer.plan().assignment.loads_flops,
        "num_rounds": parts.optimizer.plan().num_rounds,
        "vocab_size": parts.train_data.vocab_size,
    }


def _num_empty(counts: dict[str, collectives.Count]) -> int:
    """Exchanges of nothing: DDP's updates are everywhere, and only the results travel."""
    return sum(counts[kind]["calls"] for kind in ("all_to_all",) if kind in counts and not counts[kind]["bytes"])


def check(config: TrainConfig, ranks: list[dict[str, Any]]) -> Forecast:
    size = len(ranks)
    machines = Machines("cpu", DEVICES["cpu"], size)
    plan = forecast(config, world_size=size, vocab_size=ranks[0]["vocab_size"], machines=machines)
    print({key: value for key, value in ranks[0].items() if key not in ("counts", "loads")}, plan.sent)
    for kind in ("weights", "gradients", "optimizer_state"):
        assert getattr(plan.memory, kind) == max(rank[kind] for rank in ranks), kind
    assert plan.sent_bytes(muons=True) == pytest.approx(sum(r["exchange"] for r in ranks) / size, rel=0.05, abs=1)
    assert plan.sent_bytes() == pytest.approx(sum(r["sent"] for r in ranks) / size, rel=0.05)
    assert sum(t.calls for t in plan.sent) == max(rank["calls"] for rank in ranks)
    assert plan.owners.num_exchanges + plan.owners.num_sharings == max(rank["exchange_calls"] for rank in ranks)
    assert plan.owners.flops_max == max(ranks[0]["loads"])
    assert plan.owners.num_rounds == ranks[0]["num_rounds"]
    return plan


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_kept_and_sent_are_those_of_a_real_run(stdlib_data, run_ranks, layout) -> None:
    size, spread = LAYOUTS[layout]
    config = make(stdlib_data, spread)
    plan = check(config, run_ranks(lambda rank, size: one_step(config), size, join=False))
    assert plan.sent_bytes(muons=True) > 0 or "zero-" in layout


@pytest.mark.parametrize("layout", ["zero-1 2", "zero-2 4", "fsdp 2", "hsdp 2x2", "tp 2"])
def test_with_several_micro_batches(stdlib_data, run_ranks, layout) -> None:
    size, spread = LAYOUTS[layout]
    config = make(stdlib_data, spread, micro_batch_size=1)
    plan = check(config, run_ranks(lambda rank, size: one_step(config), size, join=False))
    assert plan.micro_steps == (8 if layout == "tp 2" else BATCH // size)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_mixtures_of_experts(stdlib_data, run_ranks, layout, checkpointing) -> None:
    size, spread = MOE_LAYOUTS[layout]
    config = make(stdlib_data, spread, MOE, activation_checkpointing=checkpointing)
    check(config, run_ranks(lambda rank, size: one_step(config), size, join=False))


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_what_checkpointing_sends_again(stdlib_data, run_ranks, checkpointing) -> None:
    config = make(stdlib_data, {"tensor_parallel": 2}, activation_checkpointing=checkpointing)
    check(config, run_ranks(lambda rank, size: one_step(config), 2, join=False))


def test_matrices_that_ranks_share(stdlib_data, run_ranks) -> None:
    """On four ranks a single wide block leaves some without a matrix, unless they share them."""
    config = make(stdlib_data, {"zero": 3}, {"num_layers": 1, "gated": False})
    optim = {"kind": "muon", "newton_schulz": {"dtype": "float32"}, "exchange": {"split_min_flops": 1}}
    config = TrainConfig.model_validate({**config.model_dump(), "optim": optim})
    plan = check(config, run_ranks(lambda rank, size: one_step(config), 4, join=False))
    assert plan.owners.num_shared > 0


@pytest.mark.parametrize("layout", ["fsdp 2", "hsdp 2x2"])
def test_gradients_stay_cut_over_micro_batches(stdlib_data, run_ranks, layout) -> None:
    """What a backward pass that is not the last one leaves, wherever FSDP2 keeps it."""
    world_size, spread = LAYOUTS[layout]
    config = make(stdlib_data, spread, micro_batch_size=1)

    def one(rank: int, size: int) -> list[int]:
        parts = build(config, process.start(config.dist, "cpu"), {})
        ids = torch.zeros(1, 32, dtype=torch.int64)
        with without_gradient_sync(parts.wrapped):
            parts.wrapped(ids, ids).backward()
        kept = []
        for module in parts.wrapped.modules():
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
                kept.append(group._partial_reduce_output)
                for p in group.fsdp_params:
                    kept += [p.unsharded_accumulated_grad, p.unsharded_param.grad, p.sharded_param.grad]
        return [nbytes([local_tensor(grad) for grad in kept if grad is not None]), parts.train_data.vocab_size]

    ranks = run_ranks(one, world_size, join=False)
    model = make_model(config, world_size=world_size, vocab_size=ranks[0][1], device="cpu")
    assert memory_of(model, 1).early_gradients == max(kept for kept, _ in ranks)
    assert memory_of(model, model.rank_batch).early_gradients == 0
