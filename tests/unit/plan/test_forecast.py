"""The forecast against hand counts, the optimizer's real state, and the tensors autograd really keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from muonlm.config.errors import UserError
from muonlm.config.load import validate
from muonlm.config.schema import TrainConfig
from muonlm.model import attention
from muonlm.model.build import build_model
from muonlm.model.flops import flops_per_token
from muonlm.optim.build import build_optimizer
from muonlm.plan import forecast as module
from muonlm.plan.forecast import activation_bytes, forecast, table
from muonlm.plan.matrices import muon_matrices
from muonlm_kernels import matmul_flops

MODEL = {
    "num_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}


def make(optim: str = "muon", model: dict | None = None, settings: dict | None = None, **loop: object) -> TrainConfig:
    raw = {
        "name": "x",
        "data": {"path": "x", "seq_len": 32},
        "model": MODEL | (model or {}),
        "optim": {"kind": optim} | (settings or {}),
        "schedule": {"warmup_steps": 1},
        "loop": {"steps": 10, "batch_size": 8} | loop,
    }
    return validate(TrainConfig, raw, "test")


def test_counts_by_hand() -> None:
    plan = forecast(make(micro_batch_size=2), world_size=2, vocab_size=100)
    hidden = 2 * (48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 80)
    norm = 2 * 2 * (48 + 16) + 48
    assert plan.parameters == {
        "embedding": 4800,
        "head": 4800,
        "hidden": hidden,
        "experts": 0,
        "router": 0,
        "norm": norm,
        "total": hidden + norm + 9600,
        "active": hidden + norm + 9600,
    }
    total = plan.parameters["total"]
    assert (plan.steps, plan.tokens, plan.micro_steps) == (10, 10 * 8 * 32, 2)
    assert plan.memory_bytes["optimizer_state"] == 4 * (hidden + 2 * (total - hidden))
    assert plan.memory_bytes["parameters"] == plan.memory_bytes["gradients"] == 4 * total
    assert plan.communication_bytes == {"gradient_all_reduce": 4 * total, "update_all_gather": hidden}
    assert plan.model_flops == plan.tokens * flops_per_token(make().model, 100, 32)
    shapes = [(64, 48), (32, 48), (32, 48), (48, 64), (80, 48), (80, 48), (48, 80)]
    assert plan.newton_schulz_flops == 10 * 2 * sum(matmul_flops(*shape) for shape in shapes)
    printed = table(plan)
    assert "memory a rank, optimizer state" in printed
    assert "2.56 k\n" in printed
    assert max(map(len, printed.splitlines())) < 80


def test_adamw_has_no_newton_schulz_and_one_rank_sends_nothing() -> None:
    plan = forecast(make("adamw"), world_size=1, vocab_size=100)
    assert plan.newton_schulz_flops == 0
    assert set(plan.communication_bytes.values()) == {0}
    assert plan.memory_bytes["optimizer_state"] == 8 * plan.parameters["total"]


@pytest.mark.parametrize("optim", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_optimizer_state_is_the_real_one(optim: str, tied: bool) -> None:
    assert_state_is_the_real_one(make(optim, {"tie_embeddings": tied}))


OVERRIDES = [
    {"names": ["*.q_proj.weight", "*.1.mlp.up_proj.weight"], "rule": "adamw"},
    {"roles": ["head"], "rule": "muon", "split": {"sizes": [40, 60]}},
    {"names": ["*.k_proj.weight"], "split": {"sizes": [16], "groups": 2, "separate_groups": True}},
    {"modules": ["Linear"], "names": ["*.o_proj.weight"], "lr": 0.5},
]


def test_state_with_overrides_and_momentum_in_bfloat16() -> None:
    assert_state_is_the_real_one(make(settings={"overrides": OVERRIDES, "momentum_dtype": "bfloat16"}))


def test_matrices_with_overrides_are_the_real_ones() -> None:
    config = make(settings={"overrides": OVERRIDES})
    plan = build_optimizer(build_model(config.model, 100, 0), config.optim, iterate_dtype=torch.float32).plan()
    pieces = muon_matrices(config, 100)
    assert sorted((p.label, p.rows, p.cols) for p in pieces) == sorted((p.label, p.rows, p.cols) for p in plan.pieces)
    planned = forecast(config, world_size=1, vocab_size=100)
    assert planned.newton_schulz_flops == 10 * sum(plan.assignment.loads_flops)
    with pytest.raises(UserError, match=r"optim\.overrides: lm_head\.weight: a split .* covers 100 of the 99 rows"):
        forecast(config, world_size=1, vocab_size=99)


def assert_state_is_the_real_one(config: TrainConfig) -> None:
    model = build_model(config.model, 100, 0)
    optimizer = build_optimizer(model, config.optim)
    ids = torch.zeros(1, 32, dtype=torch.int64)
    model(ids, ids).backward()
    optimizer.step()
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim
    )
    assert forecast(config, world_size=1, vocab_size=100).memory_bytes["optimizer_state"] == held


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("seq_len", [32, 160])
def test_activations_are_what_autograd_keeps(precision: str, seq_len: int) -> None:
    config = make(precision=precision)
    config = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": seq_len})})
    model = build_model(config.model, 100, 0)
    kept: dict[int, torch.Tensor] = {}
    ids = torch.zeros(4, seq_len, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        model(ids, ids)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)
    assert activation_bytes(config, 4, 100) == pytest.approx(held, rel=0.02)
    assert module.ROW_BLOCK == attention.ROW_BLOCK


@pytest.mark.parametrize(("world_size", "micro"), [(3, None), (2, 3), (16, None)])
def test_batch_that_does_not_divide(world_size: int, micro: int | None) -> None:
    with pytest.raises(UserError, match=r"loop\.batch_size 8 is not divisible"):
        forecast(make(micro_batch_size=micro), world_size=world_size, vocab_size=100)


def test_needs_no_torch() -> None:
    code = "import sys, muonlm.plan.forecast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
