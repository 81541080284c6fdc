"""The fused head and loss against F.linear + F.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from muonlm.model import loss as module
from muonlm.model.loss import linear_cross_entropy


def inputs(dtype: torch.dtype, rows: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 12, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(29, 12, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, 29, (rows,), generator=g)


@pytest.mark.parametrize("chunk_rows", [1, 8, 36, 37, 512])
def test_equals_cross_entropy_in_float64(chunk_rows: int) -> None:
    x, weight, labels = inputs(torch.float64)
    expected = F.cross_entropy(F.linear(x, weight), labels)
    grads = torch.autograd.grad(3.5 * expected, (x, weight))
    loss = linear_cross_entropy(x, weight, labels, chunk_rows)
    ours = torch.autograd.grad(3.5 * loss, (x, weight))
    assert torch.allclose(loss, expected, rtol=1e-12)
    for got, want in zip(ours, grads):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-13)


def test_gradcheck() -> None:
    x, weight, labels = inputs(torch.float64, rows=7)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels, 3), (x, weight))


@pytest.mark.parametrize("chunk_rows", [8, 512])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(chunk_rows: int, x_dtype: torch.dtype) -> None:
    x, weight, labels = inputs(torch.float32)
    x = x.detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(F.linear(x, weight).float(), labels)
        loss = linear_cross_entropy(x, weight, labels, chunk_rows)
    grads = torch.autograd.grad(expected, (x, weight))
    ours = torch.autograd.grad(loss, (x, weight))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, expected, rtol=1e-5)
    for got, want, tensor in zip(ours, grads, (x, weight)):
        assert got.dtype == tensor.dtype
        assert (got - want).norm() < 0.01 * want.norm()


def test_large_logits_stay_finite() -> None:
    x, weight, labels = inputs(torch.float32)
    loss = linear_cross_entropy(x * 1e4, weight, labels)
    assert torch.allclose(loss, F.cross_entropy(F.linear(x * 1e4, weight), labels), rtol=1e-5)


@pytest.mark.parametrize(("frozen_x", "frozen_weight"), [(True, False), (False, True)])
def test_one_side_frozen(frozen_x: bool, frozen_weight: bool) -> None:
    x, weight, labels = inputs(torch.float64)
    x.requires_grad_(not frozen_x)
    weight.requires_grad_(not frozen_weight)
    tensor = weight if frozen_x else x
    want = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), labels), tensor)[0]
    assert torch.allclose(torch.autograd.grad(linear_cross_entropy(x, weight, labels), tensor)[0], want)


def test_no_gradient_work_without_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, labels = inputs(torch.float32)
    expected = linear_cross_entropy(x, weight, labels).detach()
    monkeypatch.setattr(module.torch, "softmax", None)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(x, weight, labels, 8), expected)
    with torch.inference_mode():
        assert torch.allclose(linear_cross_entropy(x, weight, labels, 8), expected)
