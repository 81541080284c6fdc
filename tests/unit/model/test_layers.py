"""Hand-written gradients against PyTorch's, and the two attentions against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muonlm.model import attention as attention_module
from muonlm.model.attention import Heads, attention_matmul, attention_sdpa
from muonlm.model.layers import RMSNorm, activate, rope_tables


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def test_rms_norm_gradcheck_and_value() -> None:
    norm = RMSNorm(6, 1e-3).double()
    x, weight = randn(3, 4, 6), randn(6, seed=1)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.allclose(call(x, weight), F.rms_norm(x, (6,), weight, 1e-3))
    assert torch.autograd.gradcheck(call, (x, weight))


def test_rms_norm_emits_the_compute_dtype() -> None:
    norm, x = RMSNorm(64, 1e-6), randn(5, 64, dtype=torch.float32)
    assert norm(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == norm.weight.grad.dtype == torch.float32


def test_swiglu_gradcheck_and_value() -> None:
    gate, up = randn(4, 5), randn(4, 5, seed=1)
    assert torch.allclose(activate(gate, up, "silu"), F.silu(gate) * up)
    assert torch.autograd.gradcheck(lambda gate, up: activate(gate, up, "silu"), (gate, up))


def test_rope_tables_made_in_inference_mode_serve_training() -> None:
    rope_tables.cache_clear()
    heads = Heads(2, 1, 4, 10_000.0, 1e-6)
    qkv, weight = randn(1, 5, 16), randn(4, seed=1)
    with torch.inference_mode():
        attention_sdpa(qkv, weight, weight, heads)
    attention_sdpa(qkv, weight, weight, heads).sum().backward()
    assert qkv.grad is not None


SHAPES = [(2, 9, 4, 4, 6), (2, 9, 4, 2, 6), (1, 8, 6, 1, 4), (2, 1, 2, 2, 2), (3, 4, 3, 3, 8)]


@pytest.mark.parametrize(("B", "T", "H", "K", "C"), SHAPES)
def test_matmul_attention_equals_sdpa(monkeypatch: pytest.MonkeyPatch, B: int, T: int, H: int, K: int, C: int) -> None:
    """In float64, values and all gradients, with rows in several blocks (the last one short)."""
    monkeypatch.setattr(attention_module, "ROW_BLOCK", 4)
    heads = Heads(H, K, C, 100.0, 1e-5)
    tensors = randn(B, T, (H + 2 * K) * C), randn(C, seed=1), randn(C, seed=2)
    upstream = randn(B, T, H * C, seed=3).detach()
    ours, reference = (f(*tensors, heads) for f in (attention_matmul, attention_sdpa))
    assert torch.allclose(ours, reference, rtol=1e-9, atol=1e-10)
    for got, want in zip(
        torch.autograd.grad(ours, tensors, upstream), torch.autograd.grad(reference, tensors, upstream)
    ):
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-9)


def test_matmul_attention_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "ROW_BLOCK", 3)
    heads = Heads(2, 1, 4, 100.0, 1e-5)
    tensors = randn(1, 5, 16), randn(4, seed=1), randn(4, seed=2)
    assert torch.autograd.gradcheck(lambda *t: attention_matmul(*t, heads), tensors)


def test_matmul_attention_under_autocast_is_as_close_as_sdpa() -> None:
    """bf16 gradients are within rounding of the fp32 ones, and in the dtype of the inputs."""
    heads = Heads(4, 2, 32, 10_000.0, 1e-6)
    exact = (
        randn(2, 150, 256, dtype=torch.float32),
        torch.ones(32, requires_grad=True),
        torch.ones(32, requires_grad=True),
    )
    upstream = randn(2, 150, 128, seed=3, dtype=torch.float32).detach()
    want = torch.autograd.grad(attention_sdpa(*exact, heads), exact, upstream)
    rounded = exact[0].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_matmul(rounded, *exact[1:], heads)
    assert out.dtype == torch.bfloat16
    got = torch.autograd.grad(out, (rounded, *exact[1:]), upstream.bfloat16())
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, reference in zip(got, want):
        assert (ours.float() - reference).norm() < 0.02 * reference.norm()


def test_gradients_that_are_not_contiguous() -> None:
    x, upstream = randn(3, 4, 6), randn(6, 4, 3).detach().permute(2, 1, 0)
    norm = RMSNorm(6, 1e-3).double()
    want = torch.autograd.grad(F.rms_norm(x, (6,), norm.weight, 1e-3), x, upstream)[0]
    assert torch.allclose(torch.autograd.grad(norm(x), x, upstream)[0], want)
    heads = Heads(2, 1, 2, 100.0, 1e-3)
    qkv, weight, upstream = randn(3, 5, 8), randn(2, seed=1), randn(4, 5, 3).detach().permute(2, 1, 0)
    want = torch.autograd.grad(attention_sdpa(qkv, weight, weight, heads), qkv, upstream)[0]
    assert torch.allclose(torch.autograd.grad(attention_matmul(qkv, weight, weight, heads), qkv, upstream)[0], want)
