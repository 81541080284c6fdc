"""Bytes by kind: by hand, as the optimizer allocates them, and in order when ranks and settings change."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.model.build import build_model
from muonlm.optim.build import build_optimizer
from muonlm.plan.forecast import Forecast
from muonlm.plan.memory import Memory, make_model, memory_of

Make = Callable[..., TrainConfig]
PlanOf = Callable[..., Forecast]

HIDDEN = 2 * (48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 80)
NORM = 2 * 2 * (48 + 16) + 48
TOTAL = HIDDEN + NORM + 2 * 4800


def memory(config: TrainConfig, world_size: int, device: str = "cuda", micro_batch: int = 1) -> Memory:
    return memory_of(make_model(config, world_size=world_size, vocab_size=100, device=device), micro_batch)


def test_one_rank_by_hand(make: Make, plan_of: PlanOf) -> None:
    plan = plan_of(make(**{"loop.micro_batch_size": 2}), 1)
    assert plan.parameters == {
        "embedding": 4800,
        "head": 4800,
        "hidden": HIDDEN,
        "experts": 0,
        "router": 0,
        "norm": NORM,
        "total": TOTAL,
        "active": TOTAL,
    }
    assert (plan.steps, plan.tokens, plan.micro_batch, plan.micro_steps) == (10, 10 * 8 * 32, 2, 4)
    assert plan.memory.weights == plan.memory.gradients == 4 * TOTAL
    assert plan.memory.optimizer_state == 4 * (HIDDEN + 2 * (TOTAL - HIDDEN))
    assert plan.memory.gathered == 0


def test_fsdp_by_hand(make: Make) -> None:
    """Rows are cut over three ranks and rounded up, vectors too; one block and the next are there at a time."""
    found = memory(make(zero=3, **{"loop.batch_size": 9}), 3, micro_batch=3)
    matrices = 22 * 48 + 2 * 11 * 48 + 16 * 64 + 2 * 27 * 48 + 16 * 80
    vectors = 2 * 6 + 2 * 16
    root = 2 * 34 * 48 + 16
    assert found.weights == found.gradients == found.late_gradients == 4 * (2 * (matrices + vectors) + root)
    assert found.optimizer_state == 2 * 4 * matrices + 8 * (2 * vectors + root)
    block = 3 * (matrices + vectors)
    assert found.gathered == 2 * (3 * root + 2 * block) + (2 + 4) * block
    assert found.gathered_at_end == max(found.gathered, (2 + 2 + 4) * 3 * root)
    assert found.early_gradients == 0
    several = memory(make(zero=3, **{"loop.batch_size": 9}), 3, micro_batch=1)
    assert several.early_gradients == several.late_gradients == found.gradients


def test_experts_by_hand(make: Make) -> None:
    """8 experts over 2 expert-parallel ranks; the 4 of each are cut between 2 ranks, or each inside over 8."""
    stacks = 3 * 8 * 32 * 48
    one, two = memory(make("moe", zero=3), 1), memory(make("moe", zero=3, expert_parallel=2), 4)
    whole = make_model(make("moe", zero=3), world_size=1, vocab_size=100, device="cuda")
    assert sum(w.numel for w in whole.weights if w.role == "experts") == 2 * stacks
    dense = make_model(make("moe", zero=3), world_size=4, vocab_size=100, device="cuda")
    others = sum(dense.layout.local_numel(w) for w in dense.weights if w.role != "experts")
    assert two.weights == 4 * (others + 2 * stacks // 4)
    assert one.weights > two.weights
    rows = 2 * 32 * 48 * 2  # of one sequence in bfloat16, for two experts a token: sent and received too
    assert two.activations.temporaries - one.activations.temporaries == 2 * rows
    many = make_model(
        make("moe", zero=3, expert_parallel=2, **{"loop.batch_size": 16}), world_size=16, vocab_size=100, device="cuda"
    )
    assert [many.layout.cut_dim(w) for w in many.weights if w.role == "experts"] == [1] * 6
    assert sum(many.layout.local_numel(w) for w in many.weights if w.role == "experts") == 2 * stacks // 16


OVERRIDES = [
    {"names": ["*.q_proj.weight", "*.1.mlp.up_proj.weight"], "rule": "adamw"},
    {"roles": ["head"], "rule": "muon", "split": {"sizes": [40, 60]}},
    {"names": ["*.k_proj.weight"], "split": {"sizes": [16], "groups": 2, "separate_groups": True}},
    {"modules": ["Linear"], "names": ["*.o_proj.weight"], "lr": 0.5},
]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("gpt", {}),
        ("gpt", {"model.tie_embeddings": True}),
        ("gpt", {"optim.kind": "adamw"}),
        ("gpt", {"optim.overrides": OVERRIDES, "optim.momentum_dtype": "bfloat16"}),
        ("moe", {}),
        ("moe", {"model.gated": False, "model.num_shared_experts": 0}),
    ],
)
def test_parameters_and_state_are_the_real_ones(
    make: Make, plan_of: PlanOf, model: str, changes: dict[str, Any]
) -> None:
    config = make(model, **changes)
    built = build_model(config.model, 100, 0)
    planned = make_model(config, world_size=1, vocab_size=100, device="cpu").weights
    assert [(w.name, w.shape) for w in planned] == [(name, tuple(p.shape)) for name, p in built.named_parameters()]
    optimizer = build_optimizer(built, config.optim, iterate_dtype=torch.float32)
    plan = plan_of(config)
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    assert plan.memory.optimizer_state == held
    assert plan.owners.flops_max == sum(optimizer.plan().assignment.loads_flops)
    assert plan.owners.num_matrices == len(optimizer.plan().pieces)


def test_a_wrong_split_is_refused(make: Make, plan_of: PlanOf) -> None:
    config = make(**{"optim.overrides": OVERRIDES})
    with pytest.raises(UserError, match=r"optim\.overrides: lm_head\.weight: a split .* covers 100 of the 99 rows"):
        plan_of(config, vocab_size=99)


@pytest.mark.parametrize("model", ["gpt", "moe"])
def test_more_ranks_need_no_more_of_each(make: Make, model: str) -> None:
    config = make(model, zero=3, **{"loop.batch_size": 64})
    before = memory(config, 1)
    for world_size in (2, 4, 8, 16, 32, 64):
        after = memory(config, world_size, micro_batch=64 // world_size)
        for kind in ("weights", "gradients", "optimizer_state"):
            assert getattr(after, kind) <= getattr(before, kind), (kind, world_size)
        before = after
    assert before.weights < memory(config, 2).weights / 6


def test_each_stage_of_zero_keeps_less(make: Make) -> None:
    none, one, two, three = (memory(make(zero=stage), 4, micro_batch=2) for stage in range(4))
    assert none.optimizer_state > one.optimizer_state == two.optimizer_state
    assert none.late_gradients > two.late_gradients
    assert one.weights == two.weights > 3 * three.weights
    assert one.gradients == two.gradients < none.gradients


def test_replicas_and_tensor_parallelism(make: Make) -> None:
    cut, copied = memory(make(zero=3), 8), memory(make(zero=3, replicas=4), 8)
    assert copied.weights == memory(make(zero=3), 2).weights > 3 * cut.weights
    alone, shared = memory(make(), 1), memory(make(tensor_parallel=2), 2)
    assert shared.weights == alone.weights - 4 * HIDDEN // 2
    assert shared.activations.blocks < alone.activations.blocks
    assert shared.activations.head == alone.activations.head


def test_settings_that_save_memory(make: Make) -> None:
    def blocks(kind: str) -> int:
        config = make(**{"loop.activation_checkpointing": kind, "model.num_layers": 12})
        return memory(config, 1).activations.blocks

    assert blocks("none") > 1.5 * blocks("selective") > 1.5 * 1.5 * blocks("full")
    half = memory(make(zero=3, gather_dtype="bfloat16"), 4, "cpu").gathered
    assert half < memory(make(zero=3), 4, "cpu").gathered
    assert memory(make(zero=3), 4, "cuda").gathered == half
    assert memory(make(zero=3, reshard_after_forward=False, **{"model.num_layers": 9}), 4).gathered > half
    short = memory(make(**{"optim.momentum_dtype": "bfloat16"}), 1).optimizer_state
    assert memory(make(), 1).optimizer_state - short == 2 * HIDDEN


@pytest.mark.parametrize(("world_size", "micro"), [(3, None), (2, 3), (16, None)])
def test_batch_that_does_not_divide(make: Make, plan_of: PlanOf, world_size: int, micro: int | None) -> None:
    message = r"loop\.batch_size 8 is not divisible"
    with pytest.raises(UserError, match=message):
        plan_of(make(**{"loop.micro_batch_size": micro}), world_size)


def test_needs_no_torch() -> None:
    code = "import sys, muonlm.plan.forecast, muonlm.plan.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
