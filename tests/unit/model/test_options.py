"""Document masking, soft-capped logits, other feed-forward layers, second derivatives, recomputation, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muonlm.config.schema import GPTConfig, MoEConfig
from muonlm.model.build import build_model
from muonlm.model.gpt import GPT
from muonlm.model.loss import linear_cross_entropy, plain_cross_entropy

SHAPE: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2}
END = 7


def model_of(attention: str = "matmul", kind: type[GPTConfig] = GPTConfig, **changes: Any) -> GPT:
    model = build_model(kind(**SHAPE, init_std=0.3, attention=attention, **changes), 61, 0).double()
    model.document_separator = END
    return model


def ids(batch: int, seq_len: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def gradients(model: GPT, tokens: Tensor) -> list[Tensor]:
    loss = model(tokens, tokens.roll(-1, 1))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("attention", ["matmul", "sdpa", "math"])
def test_a_document_does_not_see_the_one_before(attention: str) -> None:
    """Logits after the separator are those of the second document alone: rotary positions are relative.

    Their tables are fp32, so that this holds to that precision.
    """
    model = model_of(attention, document_masking=True)
    first, second = ids(1, 90).clamp_min(8), ids(1, 40, seed=1).clamp_min(8)
    both = torch.cat((first, torch.tensor([[END]]), second), 1)
    logits = model(both)
    torch.testing.assert_close(logits[:, 91:], model(second), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, :90], model(first), rtol=1e-5, atol=1e-5)
    open_logits = model_of(attention)(both)
    assert (open_logits[:, 91:] - logits[:, 91:]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "math"])
@pytest.mark.parametrize(
    "changes",
    [
        {"document_masking": True},
        {"logit_softcap": 2.0},
        {"gated": False},
        {"activation": "relu2"},
        {"gated": False, "activation": "relu2", "tie_embeddings": True},
    ],
)
def test_implementations_agree(attention: str, changes: dict[str, Any]) -> None:
    tokens = ids(2, 70)
    tokens[:, 30] = END
    for got, want in zip(gradients(model_of(attention, **changes), tokens), gradients(model_of(**changes), tokens)):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def test_masking_needs_the_separator() -> None:
    model = model_of(document_masking=True)
    model.document_separator = None
    with pytest.raises(ValueError, match="document_separator"):
        model(ids(1, 4))


def test_soft_capped_loss_and_logits() -> None:
    x, weight = (torch.randn(n, 8, dtype=torch.float64).requires_grad_() for n in (6, 11))
    labels = torch.randint(0, 11, (6,))
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels, 4, cap=1.5), (x, weight))
    capped = 1.5 * torch.tanh(x @ weight.t() / 1.5)
    torch.testing.assert_close(linear_cross_entropy(x, weight, labels, 4, cap=1.5), F.cross_entropy(capped, labels))
    torch.testing.assert_close(plain_cross_entropy(x, weight, labels, 1.5), F.cross_entropy(capped, labels))
    assert model_of(logit_softcap=0.5)(ids(1, 5)).abs().max() <= 0.5


def test_what_an_ungated_layer_computes() -> None:
    model = model_of(gated=False, activation="relu2")
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    assert not any("gate_proj" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(mlp(x), F.linear(F.relu(F.linear(x, mlp.up_proj.weight)) ** 2, mlp.down_proj.weight))


@pytest.mark.parametrize("kind", [GPTConfig, MoEConfig])
def test_the_math_path_has_second_derivatives(kind: type[GPTConfig]) -> None:
    """A Hessian-vector product against the difference of two gradients."""
    model = model_of("math", kind)
    parameters = list(model.parameters())
    tokens = ids(1, 6)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)) for p in parameters]
    first = torch.autograd.grad(model(tokens, tokens.roll(-1, 1)), parameters, create_graph=True)
    inner = sum((a * b).sum() for a, b in zip(first, direction))
    product = torch.autograd.grad(inner, parameters, allow_unused=True)

    def shifted(size: float) -> list[Tensor]:
        with torch.no_grad():
            for parameter, step in zip(parameters, direction):
                parameter.add_(step, alpha=size)
        return list(torch.autograd.grad(model(tokens, tokens.roll(-1, 1)), parameters))

    size = 1e-5
    above, below = shifted(size), shifted(-2 * size)
    numbers = [(torch.cat([t.flatten() for t in ts])) for ts in (product, above, below)]
    expected = (numbers[1] - numbers[2]) / (2 * size)
    assert expected.norm() > 0.1
    assert (numbers[0] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
def test_recomputation_changes_no_bit_and_saves_memory(kind: str, attention: str) -> None:
    def run(recompute: str) -> tuple[list[Tensor], int]:
        model = model_of(attention, MoEConfig, balance="loss")
        for block in model.blocks:
            block.set_recompute(recompute)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            loss = model(ids(2, 30), ids(2, 30).roll(-1, 1))
        own = {p.data_ptr() for p in model.parameters()}
        kept = sum(t.numel() for pointer, t in saved.items() if pointer not in own)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))], kept

    (plain, kept), (again, kept_less) = run("none"), run(kind)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept_less < kept / 2


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("kind", [GPTConfig, MoEConfig])
def test_compiled_parts_agree(kind: type[GPTConfig], recompute: str) -> None:
    tokens = ids(2, 40)
    tokens[:, 20] = END
    changes = {"document_masking": True, "logit_softcap": 3.0}
    torch._dynamo.reset()
    compiled = model_of("auto", kind, **changes).float()
    for block in compiled.blocks:
        block.set_recompute(recompute)
    compiled.compile_parts()
    for got, want in zip(gradients(compiled, tokens), gradients(model_of("auto", kind, **changes).float(), tokens)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
