"""Joining a run: what the environment says, and what it must not say."""

from __future__ import annotations

import os
import resource

import pytest
import torch

from muonlm.config.errors import UserError
from muonlm.config.schema import DistConfig
from muonlm.dist import process

COUNTS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *COUNTS):
        monkeypatch.delenv(name, raising=False)


def test_alone_without_torchrun() -> None:
    world = process.start(DistConfig(), "cpu")
    assert (world.rank, world.size, world.backend, world.device) == (0, 1, None, torch.device("cpu"))
    assert world.is_main
    process.shutdown()


def test_ranks_join_over_gloo(run_ranks) -> None:
    def join(rank: int, size: int) -> tuple[int, int, str | None]:
        world = process.start(DistConfig(timeout_s=30), "cpu")
        total = torch.tensor(world.rank + 1)
        torch.distributed.all_reduce(total)
        return world.rank, int(total), world.backend

    assert run_ranks(join, 3, join=False) == [(0, 6, "gloo"), (1, 6, "gloo"), (2, 6, "gloo")]


@pytest.mark.parametrize("name", COUNTS)
def test_silent_copies_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "8")
    with pytest.raises(UserError, match=f"has 8 tasks here .{name}., but WORLD_SIZE is not set"):
        process.start(DistConfig(), "cpu")


def test_one_task_of_a_larger_job_is_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert process.start(DistConfig(), "cpu").size == 1


def test_broken_environment_and_impossible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs 1 CUDA devices, found 0"):
            process.start(DistConfig(), "cuda")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE='two' is no integer"):
        process.start(DistConfig(), "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="'nccl' needs CUDA devices"):
        process.start(DistConfig(backend="nccl"), "cpu")


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="glibc only")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    process.start(DistConfig(), "cpu")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(16 << 20)  # 64 MB, more than glibc ever keeps by default
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 1000  # 10 x 16384 pages when every block is mapped anew
