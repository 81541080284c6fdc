"""Forecast activations against the tensors that autograd really keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from muonlm.config.schema import TrainConfig
from muonlm.model import attention
from muonlm.model.build import build_model
from muonlm.plan import activations as module
from muonlm.plan.memory import make_model, memory_of

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("gpt", {}),
    "dense, long": ("gpt", {"data.seq_len": 160}),
    "sdpa": ("gpt", {"model.attention": "sdpa"}),
    "relu2": ("gpt", {"model.activation": "relu2"}),
    "no gate": ("gpt", {"model.gated": False}),
    "experts": ("moe", {}),
    "experts, no gate, softmax": (
        "moe",
        {"model.gated": False, "model.router": "softmax", "model.balance": "none", "model.num_shared_experts": 0},
    ),
    "checkpointing": ("gpt", {"loop.activation_checkpointing": "full", "model.num_layers": 6}),
    "checkpointing of experts": ("moe", {"loop.activation_checkpointing": "full", "model.num_layers": 6}),
}


def kept_bytes(config: TrainConfig, micro_batch: int, precision: str) -> int:
    """Bytes of what a forward pass leaves for the backward pass, parameters left out."""
    model = build_model(config.model, 100, 0)
    for block in model.blocks:
        block.set_recompute(config.loop.activation_checkpointing)
    kept: dict[int, torch.Tensor] = {}
    ids = torch.zeros(micro_batch, config.data.seq_len, dtype=torch.int64)
    ids.copy_(torch.randint(100, ids.shape, generator=torch.Generator().manual_seed(0)))
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        model(ids, ids)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_are_what_autograd_keeps(make: Callable[..., TrainConfig], variant: str, precision: str) -> None:
    name, changes = VARIANTS[variant]
    config = make(name, **changes, **{"loop.precision": precision})
    model = make_model(config, world_size=1, vocab_size=100, device="cpu")
    used = memory_of(model, 4).activations
    # With checkpointing autocast drops its copies at the end of the pass.
    copies = used.weight_copies if config.loop.activation_checkpointing == "none" else 0
    expected = used.blocks + used.head + copies
    real = kept_bytes(config, 4, precision)
    print(variant, precision, expected, real, expected / real)
    assert expected == pytest.approx(real, rel=0.05 if variant == "sdpa" else 0.01)


def test_constants_of_the_model() -> None:
    assert module.ROW_BLOCK == attention.ROW_BLOCK
