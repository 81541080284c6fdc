"""Parameters that a step or a micro-batch does not use, and parameters that the optimizer was not made for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from muonlm.bridge.deepspeed import bind, muon_for_deepspeed
from muonlm.config.errors import UserError

OnRanks = Callable[..., list[Any]]
PLAIN = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "newton_schulz": {"dtype": "float32"}}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rare = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor, is_used: bool) -> torch.Tensor:
        x = self.first(x)
        return (x + self.rare(x) if is_used else x).square().mean()


def changes(stage: int, uses: list[list[bool]], nan_at: int | None = None, **zero: Any) -> list[torch.Tensor]:
    """How each step changed `rare`, whose micro-batches use it as `uses` says; the norm of each change."""
    import deepspeed

    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(uses[0]),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
    }
    optimizer = muon_for_deepspeed(model, **PLAIN)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    bind(engine)

    def rare() -> torch.Tensor:
        params = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(params, enabled=stage == 3):
            return engine.module.rare.weight.detach().clone()

    generator = torch.Generator().manual_seed(1)
    found = []
    for step, micro_batches in enumerate(uses):
        before = rare()
        for is_used in micro_batches:
            factor = float("nan") if step == nan_at else 1.0
            engine.backward(engine(torch.randn(4, 8, generator=generator), is_used) * factor)
            engine.step()
        found.append(rare() - before)
    return found


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("uses", [[[True], [False], [True], [False]], [[False, True], [False, True], [True, True]]])
@pytest.mark.parametrize(("stage", "zero"), [(3, {}), (1, OFFLOAD), (2, OFFLOAD), (3, OFFLOAD)])
def test_gradients_of_a_step_are_of_that_step(
    gpt: SimpleNamespace, on_ranks: OnRanks, uses: Any, stage: int, zero: Any
) -> None:
    """DeepSpeed would go on with, or add to, those of the last step that used the parameter."""
    found = on_ranks(lambda rank, world: changes(stage, uses, **zero), 2)[0]
    right = on_ranks(lambda rank, world: changes(2, uses), 2)[0]
    for step, micro_batches in enumerate(uses):
        assert (found[step].norm() > 0) == any(micro_batches)
        torch.testing.assert_close(found[step], right[step], atol=1e-5, rtol=1e-4)


def test_gradients_of_a_step_that_was_left_out_are_forgotten(gpt: SimpleNamespace, on_ranks: OnRanks) -> None:
    """Else the parameter's NaN would make DeepSpeed leave out all steps that do not use it."""
    uses = [[True], [True], [False], [True]]
    skipped = on_ranks(lambda rank, world: changes(3, uses, nan_at=1), 2)[0]
    assert [float(change.norm()) > 0 for change in skipped] == [True, False, False, True]


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_that_the_optimizer_was_not_made_for_are_refused(
    gpt: SimpleNamespace, on_ranks: OnRanks, stage: int
) -> None:
    def body(rank: int, world: int) -> str:
        import deepspeed

        model = Model()
        model.rare.requires_grad_(False)
        optimizer = muon_for_deepspeed(model, **PLAIN)
        model.rare.requires_grad_(True)
        config = gpt.config(stage, zero={})
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        with pytest.raises(UserError) as caught:
            bind(engine)
        return str(caught.value)

    for said in on_ranks(body, 2):
        assert said.startswith("rare.weight: trainable in the model, but not when muon_for_deepspeed was called")
