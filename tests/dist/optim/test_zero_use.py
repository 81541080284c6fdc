"""ZeRO-1 and 2 used in ways that loops have: accumulation, values written from outside, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.optim.muon import Muon
from muonlm.optim.zero import ZeroDataParallel
from muonlm.optim.zero_bucket import LiveBucket


class Model(nn.Module):
    """Two matrices, one of which not every pass uses; the bias and the table fill up the slots and are cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 12)
        self.rare = nn.Linear(12, 12, bias=False)
        self.last = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, *, rare: bool = False) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(self.rare(hidden) if rare else hidden).square().mean()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    matrices = [(n, named.pop(n)) for n in ("first.weight", "rare.weight")]
    rest = {"params": list(named.items()), "rule": "adamw", "lr": 0.01, "name": "rest"}
    return [{"params": matrices, "name": "hidden", "lr": 0.05}, rest]


def built(rank: int, stage: int = 1, **options: Any) -> tuple[Model, nn.Module, Muon]:
    model = Model()
    engine = ZeroDataParallel(model, matrices={"first.weight", "rare.weight"}, stage=stage) if stage else None
    return model, engine or model, Muon(groups(model), dtype=torch.float32, sharding=engine, **options)


def data(number: int) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(number))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("order", ["fbfb", "ffbb"])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_several_backward_passes_add_up(run_ranks, stage, order) -> None:
    """Without no_sync, with a parameter that a pass does not reach, in both orders."""

    def run(rank: int, size: int, stage: int) -> dict[str, torch.Tensor]:
        model, wrapped, optimizer = built(rank, stage)
        for step in range(2):
            inputs = [(data(2 * step), True), (data(2 * step + 1), False)]
            if order == "ffbb":
                for loss in [wrapped(x, rare=rare) for x, rare in inputs]:
                    loss.backward()
            else:
                for x, rare in inputs:
                    wrapped(x, rare=rare).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    expected = run(0, 1, 0)
    for result in run_ranks(lambda rank, size: run(rank, size, stage), 2):
        assert_close(result, expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_two_buckets_of_gradients_are_there_at_a_time(run_ranks, monkeypatch, stage) -> None:
    """One that fills and one on its way, of four."""
    buckets: list[LiveBucket] = []
    seen: list[int] = []

    def counted(method: Callable[..., None]) -> Callable[..., None]:
        def call(self: LiveBucket, *args: int) -> None:
            method(self, *args)
            seen.append(sum(b._send is not None or b._pending is not None for b in buckets))

        return call

    for name in ("take", "reduce"):
        monkeypatch.setattr(LiveBucket, name, counted(getattr(LiveBucket, name)))

    def run(rank: int, size: int) -> list[int]:
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(8)))
        names = {name for name, _ in model.named_parameters()}
        engine = ZeroDataParallel(model, matrices=names, stage=stage, bucket_bytes=2 * 8 * 8 * 4)
        buckets.extend(engine._buckets)
        optimizer = Muon([{"params": list(model.named_parameters())}], dtype=torch.float32, sharding=engine)
        for _ in range(2):
            engine(data(rank)).square().mean().backward()
        optimizer.step()
        return seen

    for counts in run_ranks(run, 2):
        assert len(counts) >= 2 * 12
        assert max(counts) == 2


@pytest.mark.parametrize("way", ["in place", "data", "load a part"])
def test_values_written_from_outside_are_kept(run_ranks, way) -> None:
    def run(rank: int, size: int, stage: int) -> dict[str, torch.Tensor]:
        model, wrapped, optimizer = built(rank, stage)
        for step in range(2):
            with torch.no_grad():
                for param in model.parameters():
                    if way == "in place":
                        param.mul_(0.5)
                    elif way == "data":
                        param.data = param.data * 0.5
            if way == "load a part":
                model.first.load_state_dict({"weight": torch.ones(12, 8) * step, "bias": torch.ones(12)})
            wrapped(data(step), rare=True).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    expected = run(0, 1, 0)
    for result in run_ranks(lambda rank, size: run(rank, size, 1), 3):
        assert_close(result, expected)


@pytest.mark.parametrize("how", ["model.zero_grad", "nothing"])
def test_a_step_uses_up_its_gradients(run_ranks, how) -> None:
    def run(rank: int, size: int, stage: int) -> dict[str, torch.Tensor]:
        model, wrapped, optimizer = built(rank, stage)
        for step in range(3):
            wrapped(data(step), rare=True).backward()
            optimizer.step()
            if how == "model.zero_grad" or not stage:
                model.zero_grad()
        return weights(model)

    expected = run(0, 1, 0)
    for result in run_ranks(lambda rank, size: run(rank, size, 2), 2):
        assert_close(result, expected)


def test_a_skipped_step_leaves_no_gradient(run_ranks) -> None:
    def run(rank: int, size: int, stage: int) -> tuple[dict[str, torch.Tensor], int]:
        model, wrapped, optimizer = built(rank, stage, non_finite="skip")
        for step in range(3):
            bad = step == 1 and (rank == 1 or not stage)
            wrapped(data(step) * (float("nan") if bad else 1.0), rare=True).backward()
            optimizer.step()
            model.zero_grad()
        return weights(model), optimizer.num_skipped

    expected = run(0, 1, 0)
    for result, skipped in run_ranks(lambda rank, size: run(rank, size, 1), 2):
        assert skipped == expected[1] == 1
        assert_close(result, expected[0])


def test_an_engine_that_no_optimizer_uses_is_an_error() -> None:
    model = Model()
    engine = ZeroDataParallel(model, matrices={"first.weight"})
    Muon(groups(model))
    with pytest.raises(UserError, match="pass it to Muon as `sharding`"):
        engine(data(0))


def test_ranks_with_different_models_refuse_together(run_ranks) -> None:
    def run(rank: int, size: int) -> str:
        with pytest.raises(UserError) as error:
            ZeroDataParallel(nn.Linear(8, 12 + rank), matrices={"weight"})
        return str(error.value)

    messages = run_ranks(run, 2, timeout_s=20)
    assert messages[0] == messages[1]
    assert "rank 0 has bias (12,)" in messages[0]
    with pytest.raises(UserError, match=r"no parameters named wieght"):
        ZeroDataParallel(nn.Linear(8, 12), matrices={"wieght"})


def test_state_of_another_rank_is_refused(run_ranks) -> None:
    def run(rank: int, size: int) -> bool:
        _, wrapped, optimizer = built(rank)
        wrapped(data(0), rare=True).backward()
        optimizer.step()
        box = [optimizer.state_dict()]
        own = box[0]
        torch.distributed.broadcast_object_list(box, src=0)
        optimizer.load_state_dict(own)
        if rank == 0:
            return True
        with pytest.raises(UserError, match="each rank has its own part"):
            optimizer.load_state_dict(box[0])
        return True

    assert all(run_ranks(run, 2))


def test_frozen_parameters_and_buffers_come_from_rank_0(run_ranks) -> None:
    def run(rank: int, size: int) -> tuple[float, float]:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model[0].bias.requires_grad_(False)
        with torch.no_grad():
            model[0].bias.fill_(rank)
            model[1].running_mean.fill_(rank)
        ZeroDataParallel(model, matrices={"0.weight"})
        return float(model[0].bias.sum()), float(model[1].running_mean.sum())

    assert run_ranks(run, 2) == [(0.0, 0.0)] * 2
