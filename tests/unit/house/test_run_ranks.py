"""The rank harness itself: a harness that swallows a failure would make every distributed test worthless."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist


def test_ranks_reduce_together_even_after_the_parent_ran_backward(run_ranks):
    torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()

    def body(rank, world_size, factor):
        weight = torch.full((8,), float(rank + 1), requires_grad=True)
        (weight.sum() * factor).backward()
        dist.all_reduce(weight.grad)
        return rank, dist.get_world_size(), weight.grad[0].item()

    assert run_ranks(body, 3, 2.0) == [(0, 3, 6.0), (1, 3, 6.0), (2, 3, 6.0)]


def test_first_exception_reaches_the_test_and_blocked_ranks_are_freed(run_ranks):
    def body(rank, world_size):
        if rank == 1:
            raise KeyError("planted")
        dist.barrier()

    started = time.monotonic()
    with pytest.raises(KeyError, match="planted") as caught:
        run_ranks(body, 3)
    assert "rank 1 of 3" in str(caught.value.__cause__)
    assert "in body" in str(caught.value.__cause__)
    assert time.monotonic() - started < 20


def test_hung_rank_is_killed_and_shown(run_ranks):
    def body(rank, world_size):
        while rank == 1:
            time.sleep(0.05)

    with pytest.raises(TimeoutError, match=r"(?s)1 ranks did not end within 1.0 s.*rank 1 hung.*in body"):
        run_ranks(body, 2, timeout_s=1.0)


def test_dead_rank_is_an_error(run_ranks):
    def body(rank, world_size):
        if rank == 1:
            os._exit(7)

    with pytest.raises(RuntimeError, match="rank 1 died with exit code 7"):
        run_ranks(body, 2)


def test_without_join_the_code_under_test_joins_from_torchruns_environment(run_ranks):
    def body(rank, world_size):
        assert not dist.is_initialized()
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        return total.item(), torch.get_num_threads()

    assert run_ranks(body, 2, join=False) == [(2.0, 1), (2.0, 1)]
