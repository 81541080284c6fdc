"""The precision probe: right about this CPU, quick, and without a trace."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from muonlm.dist import precision
from muonlm.dist.precision import bfloat16_is_fast, matmul_tflops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    matmul_tflops.cache_clear()
    yield
    matmul_tflops.cache_clear()


def seconds_of(dtype: torch.dtype) -> float:
    """An independent timing of the same product."""
    a = torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times)


def test_rate_agrees_with_a_timing_of_its_own() -> None:
    expected = 2 * 512**3 / seconds_of(torch.float32) / 1e12
    assert matmul_tflops(torch.float32, CPU, 1) == pytest.approx(expected, rel=0.7)


def test_choice_follows_the_faster_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for bf16, fast in ((0.3, False), (1.0, False), (1.1, False), (1.8, True), (8.0, True)):
        rates = {torch.bfloat16: bf16, torch.float32: 1.0}
        monkeypatch.setattr(precision, "matmul_tflops", lambda dtype, device, threads, rates=rates: rates[dtype])
        assert bfloat16_is_fast(CPU) is fast


def test_same_answer_every_time() -> None:
    answers = set()
    for _ in range(5):
        matmul_tflops.cache_clear()
        answers.add(bfloat16_is_fast(CPU))
    assert len(answers) == 1


def test_quick_and_measured_once() -> None:
    start = time.perf_counter()
    bfloat16_is_fast(CPU)
    first = time.perf_counter() - start
    start = time.perf_counter()
    bfloat16_is_fast(CPU)
    assert first < 0.3
    assert time.perf_counter() - start < 0.001


def test_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    with torch.autocast("cpu", torch.bfloat16):
        matmul_tflops(torch.float32, CPU, threads + 1)
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_does_not_change_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(real(a, b).dtype))
    with torch.autocast("cpu", torch.bfloat16):
        matmul_tflops(torch.float32, CPU, 1)
    assert set(seen) == {torch.float32}


def test_unsupported_types_have_no_rate() -> None:
    assert matmul_tflops(torch.bool, CPU, 1) == 0.0


def test_slow_types_are_measured_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch, "mm", lambda a, b: (calls.append(a.dtype), time.sleep(0.1)))
    assert matmul_tflops(torch.bfloat16, CPU, 1) == pytest.approx(2 * 512**3 / 0.1 / 1e12, rel=0.2)
    assert len(calls) == 1
