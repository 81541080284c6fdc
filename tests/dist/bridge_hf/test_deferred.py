"""The optimizer that waits for its parameters: its state in files, and what it refuses."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from muonlm.bridge.accelerate import DeferredMuon
from muonlm.config.errors import UserError
from muonlm.config.optim import MuonConfig

CONFIG = MuonConfig.model_validate({"newton_schulz": {"dtype": "float32"}})
IDS = torch.arange(20).view(2, 10)


def experts() -> nn.Module:
    """A model with a weight that is several matrices."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_experts": 4}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=32, num_experts_per_tok=2, **shape, **heads))


def step(model: nn.Module, optimizer: DeferredMuon) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def through_a_file(state: Any) -> Any:
    """As the Trainer and accelerate read it."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_survives_a_file_and_splits_stay() -> None:
    model, again = experts(), experts()
    optimizer, loaded = DeferredMuon(model, CONFIG), DeferredMuon(again, CONFIG)
    for _ in range(2):
        step(model, optimizer)
    again.load_state_dict(model.state_dict())
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    splits = {group["name"]: group["split"] for group in loaded.param_groups if group["rule"] == "muon"}
    assert splits["experts"].sizes == (8, 8)
    for pair in ((model, optimizer), (again, loaded)):
        step(*pair)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_other_groups_is_refused() -> None:
    model, small = experts(), nn.Sequential(nn.Linear(4, 4))
    optimizer = DeferredMuon(model, CONFIG)
    step(model, optimizer)
    with pytest.raises(UserError, match="parameter groups"):
        DeferredMuon(small, CONFIG).load_state_dict(optimizer.state_dict())


def test_nothing_is_allocated_before_the_model_is_sharded() -> None:
    """accelerate reads the state and writes it back when it is given the optimizer."""
    optimizer = DeferredMuon(model := nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), CONFIG)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.muon is None
    for group in optimizer.param_groups:
        group["lr"] = 0.25
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert all(group["lr"] == 0.25 for group in optimizer.bound().param_groups)
    assert optimizer.bound().param_groups is optimizer.param_groups


def test_parameters_replaced_too_late_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = DeferredMuon(model, CONFIG)
    assert optimizer.state
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(4, 4))]
    with pytest.raises(UserError, match="prepare together"):
        optimizer.step()


def test_a_loss_scale_is_taken_out_and_an_overflow_left_out() -> None:
    models = [nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, scaled = (DeferredMuon(model, CONFIG, grad_clip=0.1) for model in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    models[0](x).square().sum().backward()
    plain.step()
    scaler.scale(models[1](x).square().sum()).backward()
    scaler.step(scaled)
    scaler.update()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    before = [param.detach().clone() for param in models[1].parameters()]
    scaled.zero_grad()
    scaler.scale(models[1](x * 1e38).square().sum()).backward()
    scaler.step(scaled)
    for kept, theirs in zip(before, models[1].parameters(), strict=True):
        assert torch.equal(kept, theirs)
