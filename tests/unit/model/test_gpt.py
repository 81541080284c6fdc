"""The whole model: equality with transformers' Qwen3, initialisation, FLOP and parameter counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muonlm.bridge.transformers import to_qwen3
from muonlm.config.errors import ConfigError
from muonlm.config.schema import GPTConfig
from muonlm.model.build import build_model
from muonlm.model.flops import count_parameters, flops_per_token

CONFIGS = [
    {"hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "num_layers": 2},
    {"hidden_size": 24, "num_heads": 6, "num_kv_heads": 2, "intermediate_size": 17, "num_layers": 3},
    {"hidden_size": 23, "num_heads": 3, "num_kv_heads": 1, "head_dim": 10, "intermediate_size": 31, "num_layers": 2},
    {
        "hidden_size": 32,
        "num_heads": 2,
        "head_dim": 32,
        "tie_embeddings": True,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-3,
        "num_layers": 1,
        "init_std": 0.3,
    },
]


def tokens(batch: int, seq_len: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(0))


def perturbed(raw: dict, vocab_size: int) -> torch.nn.Module:
    """A model whose norm weights are not 1 and whose logits are not small."""
    model = build_model(GPTConfig(**raw), vocab_size, 3)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.2)
    return model


@pytest.mark.parametrize("raw", CONFIGS)
@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
def test_equals_qwen3(raw: dict, attention: str) -> None:
    """Logits, loss and every parameter's gradient."""
    model = perturbed({**raw, "attention": attention}, 61)
    ids, labels = tokens(2, 19, 61), tokens(2, 19, 61).roll(-1, 1)
    other = to_qwen3(model)
    assert dict(other.named_parameters()).keys() == dict(model.named_parameters()).keys()
    logits = other(input_ids=ids).logits
    assert (model(ids) - logits).abs().max() < 1e-5
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    ours = model(ids, labels)
    ours.backward()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-3, atol=2e-6), name


def test_bfloat16_autocast_is_close_and_keeps_fp32_gradients() -> None:
    model = perturbed(CONFIGS[1], 61)
    ids = tokens(2, 19, 61)
    exact = model(ids, ids)
    want = torch.autograd.grad(exact, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids)
    got = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert all(gradient.dtype == torch.float32 for gradient in got)
    errors, exact_gradients = (
        torch.cat([t.flatten() for t in ts]) for ts in ([a - b for a, b in zip(got, want)], want)
    )
    assert errors.norm() < 0.03 * exact_gradients.norm()


def test_initialisation() -> None:
    config = GPTConfig(num_layers=8, hidden_size=64, num_heads=4, intermediate_size=96, init_std=0.05)
    parameters = dict(build_model(config, 200, 0).named_parameters())
    for name, parameter in parameters.items():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        scale = 4.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        assert parameter.std().item() == pytest.approx(0.05 / scale, rel=0.06), name
        assert abs(parameter.mean().item()) < 0.005


def test_seed_alone_decides_the_weights() -> None:
    config = GPTConfig(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=24)
    state = torch.get_rng_state()
    first = build_model(config, 50, 7).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again = build_model(config, 50, 7).state_dict()
    other = build_model(config, 50, 8).state_dict()
    deeper = build_model(config.model_copy(update={"num_heads": 4, "tie_embeddings": True}), 50, 7).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert value.ndim == 1 or not torch.equal(value, other[name])
        assert "norm" in name or name == "lm_head.weight" or torch.equal(value, deeper[name])
    blocks = [first[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(2)]
    assert not torch.equal(*blocks)


def test_tied_head_is_one_parameter() -> None:
    model = build_model(GPTConfig(num_layers=1, tie_embeddings=True), 40, 0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_vocabulary_mismatch_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 40"):
        build_model(GPTConfig(vocab_size=40), 41, 0)


@pytest.mark.parametrize("raw", CONFIGS)
def test_counts_equal_the_model(raw: dict) -> None:
    model = build_model(GPTConfig(**raw), 61, 0)
    counts = count_parameters(model.config, 61)
    parameters = dict(model.named_parameters())
    real = {
        "embedding": parameters["model.embed_tokens.weight"].numel(),
        "head": parameters["lm_head.weight"].numel() if "lm_head.weight" in parameters else 0,
        "hidden": sum(p.numel() for name, p in parameters.items() if "proj" in name),
        "experts": 0,
        "router": 0,
        "norm": sum(p.numel() for name, p in parameters.items() if "norm" in name),
        "total": sum(p.numel() for p in parameters.values()),
        "active": sum(p.numel() for p in parameters.values()),
    }
    assert counts == real


@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
@pytest.mark.parametrize("raw", CONFIGS)
def test_flops_equal_the_counted_ones(raw: dict, attention: str) -> None:
    """On both paths, at a length within one row block, where the matmul path computes the full square too."""
    seq_len, batch = 19, 2
    model = build_model(GPTConfig(**raw, attention=attention), 61, 0)
    ids = tokens(batch, seq_len, 61)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).backward()
    assert counter.get_total_flops() == batch * seq_len * flops_per_token(model.config, 61, seq_len)
