"""What goes wrong on one rank ends on all of them: in one clear error or the documented skip, and soon."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from muonlm.config.errors import UserError
from muonlm.optim.gradients import NonFiniteGradient
from muonlm.optim.muon import Muon

SHAPES: list[tuple[int, ...]] = [(16, 24), (24, 16), (16, 16), (7, 9)]
LAYOUTS = [(2, "replicated"), (3, "fsdp"), (4, "hsdp")]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in SHAPES]


def built(layouts: Any, layout: str, **options: Any) -> tuple[list[nn.Parameter], list[torch.Tensor], Muon]:
    """Parameters w0, w1, ... sharded as `layout` says, the last under AdamW; their first values; the optimizer."""
    params = parameters()
    initial = [p.detach().clone() for p in params]
    params = layouts.placed(params, layout)
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    groups = [{"params": named[:-1]}, {"params": named[-1:], "rule": "adamw"}]
    return params, initial, Muon(groups, **{"lr": 0.05, "dtype": torch.float32, **options})


def snapshot(params: list[nn.Parameter], optimizer: Muon) -> list[torch.Tensor]:
    """Weights and state of this rank."""
    tensors = [*params, *(t for p in params for t in optimizer.state[p].values())]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_a_rank_that_fails_in_the_middle_of_a_step_ends_all(
    run_ranks, layouts, monkeypatch, tmp_path, world, layout
) -> None:
    import muonlm.optim.muon as module

    original = module.newton_schulz

    def run(rank: int, size: int) -> None:
        def fails(stack: torch.Tensor, **options: Any) -> torch.Tensor:
            if rank == 1:
                raise MemoryError("no memory for the iterates")
            return original(stack, **options)

        module.newton_schulz = fails
        params, initial, optimizer = built(layouts, layout)
        layouts.set_grads(params, 0, initial, layout)
        begin = time.monotonic()
        try:
            optimizer.step()
        except Exception as error:
            (tmp_path / f"{rank}").write_text(f"{time.monotonic() - begin}\n{error}")
            raise

    with pytest.raises(MemoryError, match="no memory for the iterates"):
        run_ranks(run, world, timeout_s=30)
    for rank in range(world):
        seconds, message = (tmp_path / f"{rank}").read_text().split("\n", 1)
        assert float(seconds) < 10
        assert message


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(run_ranks, layouts, world, layout) -> None:
    def run(rank: int, size: int) -> list[tuple[str, bool]]:
        params, initial, optimizer = built(layouts, layout)
        layouts.set_grads(params, 0, initial, layout)
        optimizer.step()
        outcomes = []
        for value in (torch.nan, torch.inf, -torch.inf):
            layouts.set_grads(params, 1, initial, layout)
            if rank == 1:
                local(params[2].grad)[0, 0] = value
                local(params[3].grad)[0, 0] = value
            before = snapshot(params, optimizer)
            with pytest.raises(NonFiniteGradient) as error:
                optimizer.step()
            outcomes.append((str(error.value), same(before, snapshot(params, optimizer))))
        return outcomes

    message = "non-finite gradient in w2 on rank 1, w3 on rank 1"
    assert run_ranks(run, world, timeout_s=30) == [[(message, True)] * 3] * world


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_a_skipped_step_is_skipped_by_all_and_leaves_no_trace(run_ranks, layouts, world, layout) -> None:
    def run(rank: int, size: int) -> tuple[bool, bool, int]:
        results = []
        for is_disturbed in (True, False):
            params, initial, optimizer = built(layouts, layout, non_finite="skip")
            for step in (0, 1, 2):
                layouts.set_grads(params, step, initial, layout)
                before = snapshot(params, optimizer)
                if step == 1:
                    if not is_disturbed:
                        continue
                    if rank == 1:
                        local(params[0].grad)[0, 0] = torch.nan
                optimizer.step()
                if step == 1:
                    is_untouched = same(before, snapshot(params, optimizer))
            results.append((snapshot(params, optimizer), optimizer.num_skipped))
        (disturbed, num_skipped), (clean, none_skipped) = results
        assert none_skipped == 0
        return is_untouched, same(disturbed, clean), num_skipped

    assert run_ranks(run, world, timeout_s=30) == [(True, True, 1)] * world


def differing(name: str, rank: int, layouts: Any) -> Muon:
    """An optimizer that on rank 1 is not the one of the others."""
    params = layouts.placed(parameters(), "replicated")
    is_other = rank == 1
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    options: dict[str, dict[str, tuple[Any, Any]]] = {
        "lr": {"lr": (0.1, 0.2)},
        "momentum": {"momentum": (0.9, 0.95)},
        "scaling": {"scaling": ("jordan", "spectral")},
        "bucket_bytes": {"bucket_bytes": (2**20, 256)},
        "depth": {"depth": (1, 3)},
        "dtype": {"dtype": (torch.float32, torch.bfloat16)},
        "coefficients": {"coefficients": ("jordan", "quintic")},
        "non_finite": {"non_finite": ("raise", "skip")},
        "grad_clip": {"grad_clip": (1.0, 2.0)},
    }
    if name in options:
        return Muon(named, **{key: pair[is_other] for key, pair in options[name].items()})
    match name:
        case "order" if is_other:
            named = [named[1], named[0], *named[2:]]
        case "one fewer" if is_other:
            named = named[:-1]
        case "rule" if is_other:
            return Muon([{"params": named[:-1]}, {"params": named[-1:], "rule": "adamw"}])
        case "name" if is_other:
            named = [("head", named[0][1]), *named[1:]]
    return Muon([{"params": named[:-1]}, {"params": named[-1:]}] if name == "rule" else named)


DIFFERENCES = {
    "lr": "rank 0 has lr 0.1 in group 0, rank 1 lr 0.2 in group 0",
    "momentum": "rank 0 has momentum 0.9 in group 0, rank 1 momentum 0.95 in group 0",
    "scaling": "rank 0 has scaling jordan in group 0, rank 1 scaling spectral in group 0",
    "bucket_bytes": "rank 0 has bucket_bytes 1048576, rank 1 bucket_bytes 256",
    "depth": "rank 0 has depth 1, rank 1 depth 3",
    "dtype": "rank 0 has dtype torch.float32, rank 1 dtype torch.bfloat16",
    "coefficients": "rank 0 has coefficients jordan, rank 1 coefficients quintic",
    "non_finite": "rank 0 has non_finite raise, rank 1 non_finite skip",
    "grad_clip": "rank 0 has grad_clip 1.0, rank 1 grad_clip 2.0",
    "order": "rank 0 has w0 under muon, (1, 16, 24)",
    "one fewer": "rank 0 also has w3 under muon",
    "rule": "rank 0 has w3 under muon",
    "name": "rank 0 has w0 under muon",
}


def test_ranks_with_differing_optimizers_refuse_together(run_ranks, layouts) -> None:
    def run(rank: int, size: int) -> list[str]:
        messages = []
        for name in DIFFERENCES:
            optimizer = differing(name, rank, layouts)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            before = [p.detach().clone() for p in params]
            for param in params:
                param.grad = torch.ones_like(param)
            with pytest.raises(UserError) as error:
                optimizer.step()
            assert same(before, [p.detach() for p in params])
            messages.append(str(error.value))
        return messages

    first, *others = run_ranks(run, 3, timeout_s=30)
    assert all(messages == first for messages in others)
    for message, difference in zip(first, DIFFERENCES.values(), strict=True):
        assert "the optimizers of rank 1 and rank 0 differ" in message
        assert difference in message


@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (3, "replicated")])
def test_a_group_added_later_on_all_ranks_is_trained(run_ranks, layouts, world, layout) -> None:
    def run(rank: int, size: int) -> list[torch.Tensor]:
        params = parameters()
        initial = [p.detach().clone() for p in params]
        params = layouts.placed(params, layout) if size > 1 else params
        optimizer = Muon(params[:2], lr=0.05, dtype=torch.float32)
        for step in range(3):
            if step == 1:
                optimizer.add_param_group({"params": params[2:], "scaling": "jordan"})
            layouts.set_grads(params, step, initial, layout)
            optimizer.step()
        return [layouts.full(p) for p in params]

    expected = run(0, 1)
    for result in run_ranks(run, world, timeout_s=30):
        assert same(result, expected)


@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
def test_a_group_added_later_on_one_rank_stops_all(run_ranks, layouts, layout) -> None:
    def run(rank: int, size: int) -> str:
        params, initial, optimizer = built(layouts, layout)
        layouts.set_grads(params, 0, initial, layout)
        optimizer.step()
        if rank == 1:
            optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(4, 4)))]})
        layouts.set_grads(params, 1, initial, layout)
        with pytest.raises(UserError) as error:
            optimizer.step()
        return str(error.value)

    messages = run_ranks(run, 2, timeout_s=30)
    assert messages[0] == messages[1]
    assert "differ (5 parameters against 4): rank 1 also has late under muon" in messages[0]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_a_parameter_without_gradient_on_some_ranks_stops_all(run_ranks, layouts, world, layout) -> None:
    def run(rank: int, size: int) -> tuple[str, bool]:
        params, initial, optimizer = built(layouts, layout)
        layouts.set_grads(params, 0, initial, layout)
        if rank == 1:
            params[1].grad = params[3].grad = None
        before = snapshot(params, optimizer)
        with pytest.raises(UserError) as error:
            optimizer.step()
        return str(error.value), same(before, snapshot(params, optimizer))

    results = run_ranks(run, world, timeout_s=30)
    assert len(set(results)) == 1
    assert "w1 has no gradient on rank 1 but has one on the others" in results[0][0]
    assert results[0][1]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_a_parameter_without_gradient_on_all_ranks_is_left_alone(run_ranks, layouts, world, layout) -> None:
    def run(rank: int, size: int) -> list[torch.Tensor]:
        if size == 1:
            params = parameters()
            initial = [p.detach().clone() for p in params]
            optimizer = Muon([{"params": params[:-1]}, {"params": params[-1:], "rule": "adamw"}], lr=0.05)
        else:
            params, initial, optimizer = built(layouts, layout, dtype=torch.bfloat16)
        for step in range(3):
            layouts.set_grads(params, step, initial, layout)
            if step == 1:
                params[1].grad = params[3].grad = None
            elif step == 2:
                for param in params[1:]:
                    param.grad = None
            alone = [p for p in params if p.grad is None]
            before = snapshot(alone, optimizer)
            optimizer.step()
            assert same(before, snapshot(alone, optimizer))
        return [layouts.full(p) for p in params]

    expected = run(0, 1)
    for result in run_ranks(run, world, timeout_s=30):
        for mine, whole in zip(result, expected, strict=True):
            assert torch.equal(mine, whole)


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_ranks_that_hold_nothing_take_part(run_ranks, layouts, layout) -> None:
    """One row over two to four ranks, clipped and unclipped, under both rules."""

    def run(rank: int, size: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(1, 12), (1, 5), (1,), (2, 3)]]
        initial = [p.detach().clone() for p in params]
        params = layouts.placed(params, layout) if size > 1 else params
        groups = [{"params": params[:2]}, {"params": params[2:], "rule": "adamw"}]
        optimizer = Muon(groups, lr=0.05, dtype=torch.float32, grad_clip=0.01, non_finite="skip")
        assert size == 1 or rank < 2 or layout == "hsdp" or local(params[0]).numel() == 0
        for step in range(3):
            layouts.set_grads(params, step, initial, layout)
            optimizer.step()
        assert optimizer.num_skipped == 0
        return [layouts.full(p) for p in params]

    expected = run(0, 1)
    for result in run_ranks(run, 4, timeout_s=30):
        for mine, whole in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, whole, atol=1e-6, rtol=1e-6)


def test_gradients_that_were_not_averaged_stop_all(run_ranks, layouts) -> None:
    """Each matrix would get the update of its owner's gradient alone, and all ranks would agree on it."""

    def run(rank: int, size: int) -> tuple[str, bool]:
        params, initial, optimizer = built(layouts, "replicated")
        layouts.set_grads(params, 0, initial, "replicated")
        params[1].grad *= 1 + rank
        before = snapshot(params, optimizer)
        with pytest.raises(UserError) as error:
            optimizer.step()
        return str(error.value), same(before, snapshot(params, optimizer))

    results = run_ranks(run, 3, timeout_s=30)
    assert len(set(results)) == 1
    assert results[0][0].startswith("w1, which every rank holds, has a gradient of norm")
    assert "average gradients over the ranks" in results[0][0]
    assert results[0][1]


def test_a_step_without_any_gradient_is_an_error_on_all_ranks(run_ranks) -> None:
    """An optimizer that was built before the model was sharded would train nothing, silently."""

    def run(rank: int, size: int) -> str:
        optimizer = Muon([("w", torch.nn.Parameter(torch.ones(4, 4)))])
        with pytest.raises(UserError) as error:
            optimizer.step()
        return str(error.value)

    assert all("no parameter of this optimizer has a gradient" in message for message in run_ranks(run, 2))
