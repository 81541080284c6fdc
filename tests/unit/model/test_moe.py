"""Experts and their router: equality with transformers, of the implementations with each other, and even loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muonlm.config.schema import MoEConfig
from muonlm.model import experts, moe, tokens
from muonlm.model.build import build_model
from muonlm.model.flops import count_parameters, flops_per_token

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "num_experts": 6,
    "experts_per_token": 2,
    "expert_size": 12,
}
COUNTS = torch.tensor([3, 0, 4, 1])


def ids(batch: int, seq_len: int) -> Tensor:
    return torch.randint(0, 61, (batch, seq_len), generator=torch.Generator().manual_seed(0))


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def operands(*, gated: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    weights = [randn(4, 5, 3, seed=seed) for seed in ((1, 2) if gated else (1,))] + [randn(4, 3, 5, seed=3)]
    return weights, randn(8, 3, seed=4), randn(8, seed=5)


@pytest.mark.parametrize("kind", ["silu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_loop_has_the_values_and_gradients_of_the_reference(kind: str, gated: bool) -> None:
    weights, x, scale = operands(gated=gated)
    results = []
    for implementation in (experts.experts_reference, experts.experts_loop):
        out = implementation(x, scale, COUNTS, weights, kind)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, scale, *weights])])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_loop_has_the_gradients_of_finite_differences() -> None:
    weights, x, scale = operands(gated=True)
    assert torch.autograd.gradcheck(
        lambda x, scale, *weights: experts.experts_loop(x, scale, COUNTS, list(weights), "silu"), (x, scale, *weights)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_have_the_values_and_gradients_of_the_reference(dtype: torch.dtype) -> None:
    # multiples of 8, as the kernels of GPUs need
    shapes = [(4, 16, 8), (4, 16, 8), (4, 8, 16)]
    weights = [randn(*shape, seed=seed).detach().to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    x, scale = randn(8, 8, seed=4).detach().to(dtype).requires_grad_(), randn(8).detach().float().requires_grad_()
    results = []
    for implementation in (experts.experts_reference, experts.experts_grouped):
        out = implementation(x, scale, COUNTS, weights, "silu")
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), [x, scale, *weights])])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": "grouped", "attention": "sdpa", "expert_size": 16},
        {"attention": "math"},
        {"balance": "loss", "router": "softmax", "num_shared_experts": 0},
        {"gated": False, "activation": "relu2", "normalize_weights": False, "routed_scale": 2.5},
    ],
)
def test_a_model_is_the_same_with_every_implementation(changes: dict[str, Any]) -> None:
    # grouped products take no float64
    dtype, tolerance = (torch.float32, 2e-4) if "experts" in changes else (torch.float64, 1e-9)

    def run(**more: Any) -> list[Tensor]:
        model = build_model(MoEConfig(**{**SHAPE, **changes, **more}), 61, 0).to(dtype)
        loss = model(ids(2, 9), ids(2, 9).roll(-1, 1))
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for got, want in zip(run(), run(experts="reference", attention="matmul"), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 1e-3)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    router = moe.TopKRouter(MoEConfig(**SHAPE))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = randn(40, 16).detach().float()
    before = router(x)
    router.e_score_correction_bias[3] = 10.0
    after = router(x)
    assert (after.experts_NK == 3).any(1).all()
    assert not (before.experts_NK == 3).any(1).all()
    scores = torch.sigmoid(x @ router.weight.t()).gather(1, after.experts_NK)
    torch.testing.assert_close(after.weights_NK, scores / scores.sum(1, keepdim=True))


def test_the_auxiliary_loss_is_one_for_even_loads_and_grows_with_uneven_ones() -> None:
    even = moe.auxiliary_loss(torch.full((4,), 5), torch.full((10, 4), 0.25))
    assert even == pytest.approx(1.0)
    uneven = moe.auxiliary_loss(torch.tensor([20, 0, 0, 0]), torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(10, 4))
    assert uneven == pytest.approx(4 * 0.7)


def test_the_auxiliary_loss_has_a_gradient_and_no_value() -> None:
    losses, gradients = [], []
    for coefficient in (0.0, 0.5):
        model = build_model(MoEConfig(**SHAPE, balance="loss", balance_coefficient=coefficient), 61, 0)
        loss = model(ids(2, 9), ids(2, 9))
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, model.model.layers[1].mlp.gate.weight)[0])
    assert losses[0] == losses[1]
    assert not torch.allclose(*gradients)


def test_the_bias_moves_against_the_load() -> None:
    model = build_model(MoEConfig(**SHAPE, bias_rate=0.25), 61, 0)
    model(ids(4, 9), ids(4, 9))
    router = model.model.layers[1].mlp.gate
    rows = router._load[:6].clone()
    balance = moe.settle_loads(model, measure=True)
    assert rows.sum() == 4 * 9 * 2
    assert torch.equal(router.e_score_correction_bias, 0.25 * torch.sign(rows.mean() - rows).float())
    assert balance.max_load == pytest.approx((rows.max() / rows.mean()).item())
    assert balance.dropped_rows == 0
    assert 0 < balance.router_entropy <= torch.log(torch.tensor(6.0))


def test_loads_count_training_passes_since_the_last_step_alone() -> None:
    model = build_model(MoEConfig(**SHAPE), 61, 0)
    router = model.model.layers[1].mlp.gate
    model(ids(4, 9), ids(4, 9))
    moe.forget_loads(model)
    with torch.no_grad():
        model(ids(4, 9), ids(4, 9))
    model.eval()
    model(ids(4, 9), ids(4, 9))
    assert router._load is None
    model.train()
    for _ in range(3):
        model(ids(4, 9), ids(4, 9))
    assert router.take_load()[:6].sum() == 3 * 4 * 9 * 2
    assert moe.settle_loads(build_model(MoEConfig(**SHAPE), 61, 0).model.layers[0], measure=True) is None


def test_rows_go_to_experts_and_back() -> None:
    x, keys = randn(5, 3), torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0, 0])
    order = tokens.order_by(keys)
    rows = tokens.repeat_rows(x, order, 2)
    assert torch.equal(keys[order.order_S], keys.sort().values)
    assert torch.equal(rows, x.repeat_interleave(2, 0)[order.order_S])
    assert torch.allclose(tokens.sum_rows(rows, order, 2), 2 * x)
    assert torch.autograd.gradcheck(lambda x: tokens.repeat_rows(x, order, 2), (x,))
    assert torch.autograd.gradcheck(lambda y: tokens.sum_rows(y, order, 2), (rows.detach().requires_grad_(),))


@pytest.mark.parametrize("changes", [{}, {"num_shared_experts": 0, "gated": False, "num_dense_layers": 0}])
def test_flops_equal_the_counted_ones(changes: dict[str, Any]) -> None:
    """However rows are spread: no expert takes more, or less, than comes."""
    config = MoEConfig(**{**SHAPE, **changes}, experts="reference", attention="sdpa")
    model = build_model(config, 61, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids(2, 19), ids(2, 19)).backward()
    assert counter.get_total_flops() == 2 * 19 * flops_per_token(config, 61, 19)


def test_counts_equal_the_model() -> None:
    config = MoEConfig(**SHAPE, num_shared_experts=2)
    model = build_model(config, 61, 0)
    counts = count_parameters(config, 61)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert counts["total"] == sum(sizes.values())
    assert counts["experts"] == sum(size for name, size in sizes.items() if ".experts." in name) == 3 * 6 * 12 * 16
    assert counts["router"] == sizes["model.layers.1.mlp.gate.weight"]
    assert counts["active"] == counts["total"] - counts["experts"] * 4 // 6
    weights = counts["active"] - counts["norm"] - counts["embedding"]
    assert flops_per_token(config, 61, 8) == 6 * weights + 12 * 2 * 2 * 8 * 8
