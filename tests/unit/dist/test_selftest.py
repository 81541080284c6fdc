"""The start-up self-test on real ranks: whom it waits for, what it refuses, what it prints, what it costs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from muonlm.config.errors import UserError
from muonlm.config.schema import DistConfig
from muonlm.dist import process, selftest
from muonlm.dist.selftest import Place

TWO_HOSTS = [
    Place("a", "cpu", "eth0", "10.0.0.1"),
    Place("a", "cpu", "eth0", "10.0.0.1"),
    Place("b", "cpu", "eth0", "10.0.0.2"),
]


def test_rank_0_says_who_is_there_in_one_line_and_soon(run_ranks, capfd: pytest.CaptureFixture[str]) -> None:
    def join(rank: int, size: int) -> float:
        begin = time.perf_counter()
        process.start(DistConfig(timeout_s=30), "cpu")
        return time.perf_counter() - begin

    seconds = run_ranks(join, 2, join=False)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("start-up:")]
    assert len(lines) == 1
    assert "2 ranks over gloo on 1 host; 4 MiB all-reduce" in lines[0]
    assert "ranks 0 to 1: " in lines[0]
    assert max(seconds) < 5  # 0.1 s on an idle machine


def test_ranks_that_do_not_come_are_named_by_all_others(run_ranks) -> None:
    def join(rank: int, size: int) -> str:
        if rank in (1, 3):
            time.sleep(2.5)
            return ""
        with pytest.raises(UserError) as caught:
            process.start(DistConfig(timeout_s=1.0), "cpu")
        time.sleep(0.5)  # rank 0 serves the store
        return str(caught.value)

    selftest._GRACE_S, before = 0.2, selftest._GRACE_S  # the ranks are forks of this process
    try:
        messages = run_ranks(join, 4, join=False)
    finally:
        selftest._GRACE_S = before
    for rank in (0, 2):
        assert "ranks 1, 3 of 4 did not come within 1 s" in messages[rank]
        assert "ranks 0, 2: " in messages[rank]


def test_a_rank_that_hangs_before_the_first_sum_is_named(run_ranks) -> None:
    def add(rank: int, size: int) -> str:
        store = dist.distributed_c10d._get_default_store()
        selftest.check_in(store, rank, size, Place(f"host{rank}", "cpu", "eth0", "10.0.0.1"), 10.0)
        if rank == 1:
            time.sleep(1.5)
            return ""
        with pytest.raises(UserError) as caught:
            selftest.first_sum(store, rank, size, torch.device("cpu"), 0.5)
        return str(caught.value)

    first, hung, last = run_ranks(add, 3)
    assert hung == ""
    for message in (first, last):
        assert "rank 1 of 3 joined but did not take part in the first all-reduce within 0.5 s" in message
        assert "host1" in message
        assert "host0" not in message


def test_a_wrong_sum_is_noticed(run_ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(rank: int, size: int) -> None:
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *shape, **options: ones(*shape, **options) + 0.5 * rank)
        with pytest.raises(UserError, match=r"the sum of ones over 2 ranks is 2\.5"):
            selftest.first_sum(dist.distributed_c10d._get_default_store(), rank, size, torch.device("cpu"), 10.0)

    run_ranks(add, 2)


def test_summary_has_a_line_for_each_host() -> None:
    lines = selftest.summary(TWO_HOSTS, "gloo", 0.004).splitlines()
    assert len(lines) == 3
    assert "3 ranks over gloo on 2 hosts; 4 MiB all-reduce 4.0 ms (1.4 GB/s a rank)" in lines[0]
    assert lines[1].strip() == "ranks 0 to 1: a, cpu, eth0 10.0.0.1"
    assert lines[2].strip() == "rank 2: b, cpu, eth0 10.0.0.2"


def test_loopback_between_hosts_is_refused_under_gloo_alone() -> None:
    looped = [*TWO_HOSTS[:2], Place("b", "cpu", "lo", "127.0.1.1")]
    with pytest.raises(UserError, match=r"rank 2 would use gloo over 127\.0\.1\.1.*GLOO_SOCKET_IFNAME="):
        selftest.check_routes(looped, "gloo")
    selftest.check_routes(looped, "nccl")
    selftest.check_routes(TWO_HOSTS, "gloo")
    selftest.check_routes([Place("b", "cpu", "lo", "127.0.1.1")] * 2, "gloo")


def test_interfaces_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    cpu = torch.device("cpu")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert selftest.find_place(cpu, "nccl").address == "127.0.0.1"
    assert selftest.find_place(cpu, "nccl").interface == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert selftest.find_place(cpu, "gloo").address == "127.0.0.1"
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-name.invalid")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert selftest.find_place(cpu, "gloo").address == "127.0.0.1"  # as gloo does
