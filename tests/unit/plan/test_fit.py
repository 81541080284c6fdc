"""What does not fit is refused, by how much, with changes that make it fit; what fits is let through."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.plan.fit import check_fits, fitting_changes, largest_micro_batch
from muonlm.plan.memory import make_model, memory_of

Make = Callable[..., TrainConfig]
LARGE: dict[str, Any] = {"loop.batch_size": 64, "data.seq_len": 512, "model.num_layers": 8}


def peak(config: TrainConfig, world_size: int, micro_batch: int) -> int:
    return memory_of(make_model(config, world_size=world_size, vocab_size=100, device="cuda"), micro_batch).peak


def test_the_border_is_the_forecast(make: Make) -> None:
    config = make(**LARGE)
    needed = peak(config, 1, 64)
    check_fits(config, world_size=1, vocab_size=100, memory_bytes=needed)
    with pytest.raises(UserError, match=r"in the forward pass, 0\.0 MB more than"):
        check_fits(config, world_size=1, vocab_size=100, memory_bytes=needed - 1)


def test_the_largest_micro_batch_fits_and_the_next_does_not(make: Make) -> None:
    config = make(**LARGE)
    memory_bytes = peak(config, 1, 16) + 1000
    with pytest.raises(UserError, match=r"loop\.micro_batch_size=16 \(the largest that does\)"):
        check_fits(config, world_size=1, vocab_size=100, memory_bytes=memory_bytes)
    assert peak(config, 1, 32) > memory_bytes
    check_fits(make(**LARGE, **{"loop.micro_batch_size": 16}), world_size=1, vocab_size=100, memory_bytes=memory_bytes)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3, 0.7])
def test_every_change_that_is_named_does_fit(make: Make, world_size: int, share: float) -> None:
    config = make(**LARGE, **{"loop.micro_batch_size": 16})
    memory_bytes = int(share * peak(config, world_size, 16))
    model = make_model(config, world_size=world_size, vocab_size=100, device="cuda")
    named = list(fitting_changes(model, memory_bytes))
    print(named)
    assert named or share < 0.1
    for text in named:
        changes = dict(re.findall(r"([\w.]+)=(\w+)", text))
        ranks = re.match(r"(\d+) ranks", text)
        raw = config.model_dump()
        for key, value in changes.items():
            table, name = key.split(".")
            raw[table][name] = int(value) if value.isdigit() else value
        check_fits(
            TrainConfig.model_validate(raw),
            world_size=int(ranks[1]) if ranks else world_size,
            vocab_size=100,
            memory_bytes=memory_bytes,
        )


def test_changes_of_each_kind_are_found(make: Make) -> None:
    def named(memory_bytes: int, world_size: int = 1, **changes: Any) -> list[str]:
        model = make_model(make(**LARGE, **changes), world_size=world_size, vocab_size=100, device="cuda")
        return list(fitting_changes(model, memory_bytes))

    alone = make(**LARGE)
    least = peak(alone, 1, 1)
    assert [text.split("=")[0] for text in named(least)] == ["loop.micro_batch_size", "loop.activation_checkpointing"]
    state = {"loop.micro_batch_size": 1, "loop.activation_checkpointing": "full", "model.intermediate_size": 50_000}
    wide = peak(make(**LARGE, **state), 4, 1)
    assert any("dist.zero=3" in text for text in named(wide * 2 // 3, 4, **state))
    assert any(re.match(r"\d+ ranks", text) for text in named(wide // 3, 1, **state))
    assert named(1000) == []


def test_nothing_fits(make: Make) -> None:
    with pytest.raises(UserError, match="Nothing that was tried fits"):
        check_fits(make(**LARGE), world_size=1, vocab_size=100, memory_bytes=1000)
    model = make_model(make(**LARGE), world_size=1, vocab_size=100, device="cuda")
    assert largest_micro_batch(model, 1000) is None


def test_an_unknown_device_counts_as_the_one_that_needs_less(make: Make) -> None:
    config = make(**LARGE)
    memory_bytes = peak(config, 1, 64)
    with pytest.raises(UserError):
        check_fits(config, world_size=1, vocab_size=100, memory_bytes=memory_bytes, device="cpu")
    check_fits(config, world_size=1, vocab_size=100, memory_bytes=memory_bytes)
