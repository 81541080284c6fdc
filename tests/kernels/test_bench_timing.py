"""Timers, rounds and intervals of the benchmarks, with clocks that the tests advance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from muonlm_kernels.bench import timing

CPU = torch.device("cpu")


def test_median_interval_is_that_of_order_statistics() -> None:
    # 2 P(B <= 3), B binomial(15, 1/2), is 2 (1 + 15 + 105 + 455) / 2^15.
    assert timing.median_interval(list(range(15, 0, -1))) == (4, 12, 1 - 2 * 576 / 2**15)
    assert timing.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0, 0.75)
    assert timing.median_interval([7.0]) == (7.0, 7.0, 0.0)


def test_rounds_rotate_and_end_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def timer(call: Callable[[], object]) -> float:
        clock[0] += 1.0
        order.append(call())
        return clock[0]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    calls = {name: partial(str, name) for name in "abc"}
    seconds = timing.interleaved(calls, timer, rounds=10, budget_s=1.0, least=4)
    assert "".join(order) == "abcbcacababc"
    assert seconds["b"] == [2.0, 4.0, 9.0, 11.0]
    assert [len(values) for values in timing.interleaved(calls, timer, rounds=6).values()] == [6, 6, 6]
    seconds = timing.interleaved(calls, timer, rounds=6, once={"b"})
    assert {name: len(values) for name, values in seconds.items()} == {"a": 6, "b": 1, "c": 6}


def test_the_cpu_timer_takes_the_mean_of_as_many_calls_as_fill_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def call() -> None:
        clock[0] += 0.25

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.cpu_timer(0.9)(call) == 0.25
    assert clock[0] == 1.0


def test_the_gpu_timer_clears_the_cache_outside_what_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events that read a clock which the flush and the call advance."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = -1.0

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Flush:
        def zero_(self) -> None:
            clock[0] += 1000.0

    def call() -> None:
        clock[0] += 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing.torch, "empty", lambda *size, **options: Flush())
    # 2 ms a call: one to see how long it takes, then 10 ms of calls.
    assert timing.gpu_timer(CPU, sample_s=0.01)(call) == pytest.approx(2e-3)
    assert clock[0] == (1 + 5) * 1002.0
