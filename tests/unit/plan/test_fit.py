"""What does not fit is refused, by how much, with changes that make it fit; what fits is let through."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.dist import process
from muonlm.plan.fit import check_fits, fitting_changes, largest_micro_batch
from muonlm.plan.machine import host_memory_bytes
from muonlm.plan.memory import make_model, memory_of
from muonlm.train import setup
from muonlm.train.loop import train

Make = Callable[..., TrainConfig]
LARGE: dict[str, Any] = {"loop.batch_size": 64, "data.seq_len": 512, "model.num_layers": 8}


def peak(config: TrainConfig, world_size: int, micro_batch: int) -> int:
    return memory_of(make_model(config, world_size=world_size, vocab_size=100, device="cuda"), micro_batch).peak


def test_the_border_is_the_forecast(make: Make) -> None:
    config = make(**LARGE)
    needed = peak(config, 1, 64)
    check_fits(config, world_size=1, vocab_size=100, memory_bytes=needed)
    with pytest.raises(
        UserError,
        match=r"needs 0\.7 GB, 0\.0 MB more than the 0\.7 GB there are \(loss: activations of blocks 0\.6 GB, ",
    ):
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
        model = make_model(make(**(LARGE | changes)), world_size=world_size, vocab_size=100, device="cuda")
        return list(fitting_changes(model, memory_bytes))

    alone = make(**LARGE)
    least = peak(alone, 1, 1)
    assert [text.split("=")[0] for text in named(least)] == ["loop.micro_batch_size", "loop.activation_checkpointing"]
    state = {"loop.micro_batch_size": 1, "loop.activation_checkpointing": "full", "model.intermediate_size": 50_000}
    state["data.seq_len"] = 16
    wide = peak(make(**(LARGE | state)), 4, 1)
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


def run_config(data: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    model = {"kind": "gpt", "num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    loop = {"steps": 2, "batch_size": 4, "device": "cpu", "threads": 1, "precision": "float32"}
    raw: dict[str, Any] = {
        "name": "x",
        "run_dir": str(run_dir),
        "data": {"path": str(data), "seq_len": 32},
        "model": model,
        "optim": {"kind": "muon"},
        "schedule": {"warmup_steps": 1},
        "loop": loop,
    }
    for key, value in changes.items():
        table, _, name = key.partition(".")
        raw[table][name] = value
    return TrainConfig.model_validate(raw)


def test_training_refuses_what_cannot_fit_before_it_takes_memory(
    stdlib_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "outline", lambda *args: pytest.fail("the model was built"))
    config = run_config(stdlib_data, tmp_path / "run", **{"model.hidden_size": 2**17, "model.num_heads": 2**10})
    begin = time.process_time()
    with pytest.raises(UserError) as caught:
        train(config)
    assert time.process_time() - begin < 5
    assert re.search(
        r"a rank needs [\d,.]+ GB, [\d,.]+ GB more than the [\d,.]+ GB there are \(.*optimizer state [\d,.]+ GB.* "
        r"(What fits: \d+ ranks|Nothing that was tried fits)",
        str(caught.value),
    )
    assert str(caught.value).endswith("loop.check_memory=false starts the run all the same")


def test_a_rank_has_its_share_of_what_the_host_has_left(
    stdlib_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(stdlib_data, tmp_path)
    model = make_model(config, world_size=1, vocab_size=512, device="cpu")
    needed = memory_of(model, model.micro_batch).peak
    world = process.World(0, 1, 0, torch.device("cpu"), None)
    decided = {"precision": "float32", "newton_schulz_dtype": "float32"}

    def check(left: int | None, ranks: str) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setattr(setup, "host_memory_bytes", lambda: left)
        setup._check_memory(config, world, 512, decided)

    check(needed, "1")
    check(3 * needed, "3")
    check(None, "1")
    for left, ranks in ((needed - 1, "1"), (3 * needed, "4")):
        with pytest.raises(UserError, match="a rank needs"):
            check(left, ranks)


def test_the_check_can_be_overruled(stdlib_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "host_memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"loop\.check_memory=false"):
        train(run_config(stdlib_data, tmp_path / "refused"))
    status = train(run_config(stdlib_data, tmp_path / "run", **{"loop.check_memory": False}))
    assert (status.state, status.step) == ("finished", 2)


def test_small_runs_are_checked_in_no_time(make: Make) -> None:
    config = make(**LARGE, zero=2)
    begin = time.process_time()
    check_fits(config, world_size=8, vocab_size=50_000, memory_bytes=2**40, device="cpu")
    assert time.process_time() - begin < 0.5


GROUPS = {
    "none": ({}, 4000 * 1024),
    "v2": ({"sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": "1000\n"}, 1000),
    "v2, outer ones out of sight": ({"sys/fs/cgroup/memory.max": "2000\n"}, 2000),
    "v2, more than there is": ({"sys/fs/cgroup/a/b/memory.max": "99999999\n"}, 4000 * 1024),
    "v1": ({"sys/fs/cgroup/memory/c/memory.limit_in_bytes": "3000\n"}, 3000),
    "v1, no limit": ({"sys/fs/cgroup/memory/c/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, 4000 * 1024),
    "of another controller": ({"sys/fs/cgroup/memory/d/memory.limit_in_bytes": "10\n"}, 4000 * 1024),
}


@pytest.mark.parametrize("case", GROUPS)
def test_memory_that_a_host_has_left(tmp_path: Path, case: str) -> None:
    files, expected = GROUPS[case]
    files = files | {
        "proc/meminfo": "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n",
        "proc/self/cgroup": "3:cpu,cpuacct:/d\n2:memory:/c\n0::/a/b\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert host_memory_bytes(tmp_path) == expected


def test_memory_of_this_machine() -> None:
    """Without files of Linux's, all that there is."""
    here, total = host_memory_bytes(), host_memory_bytes(Path("/nowhere"))
    assert here is not None
    assert total is not None
    assert 2**26 < here <= total
