"""Timing for the benchmarks: one call on a CPU or a GPU, interleaved rounds, the interval of a median, the machine.

A slow phase of the machine hits all contenders of a round alike, so ratios are taken within rounds and their median is
reported. The interval needs no assumption on the distribution of the ratios (see `median_interval`).
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
Timer = Callable[[Call], float]
"""Seconds of one call."""

_FLUSH_BYTES = 512 * 2**20
"""More than the last-level cache of any current GPU (MI300X: 256 MiB)."""

LEAST_ROUNDS = 5
"""These are made however long they take."""


def cpu_timer(sample_s: float = 0.02) -> Timer:
    """A timer by the wall clock: the mean of as many calls as fill `sample_s` seconds, at least one."""

    def seconds(call: Call) -> float:
        calls, begin = 0, time.perf_counter()
        while True:
            call()
            calls += 1
            elapsed = time.perf_counter() - begin
            if elapsed >= sample_s:
                return elapsed / calls

    return seconds


def gpu_timer(device: torch.device, sample_s: float = 0.02, max_calls: int = 50) -> Timer:
    """A timer by device events: the median of at most `max_calls` calls, about `sample_s` seconds of them.

    Before each call a buffer larger than the caches is overwritten, so that no call finds its input there. The host
    runs ahead while that happens: what counts is the device's time, not the launches.
    """
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def once(call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        call()
        end.record()
        return begin, end

    def elapsed(events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize(device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def seconds(call: Call) -> float:
        (first,) = elapsed([once(call)])
        calls = min(max_calls, max(3, math.ceil(sample_s / max(first, 1e-6))))
        return statistics.median(elapsed([once(call) for _ in range(calls)]))

    return seconds


def timer_for(device: torch.device, sample_s: float = 0.02) -> Timer:
    """`gpu_timer` for a CUDA or ROCm device, `cpu_timer` otherwise."""
    return gpu_timer(device, sample_s) if device.type == "cuda" else cpu_timer(sample_s)


def interleaved(
    calls: Mapping[str, Call],
    timer: Timer,
    *,
    rounds: int,
    budget_s: float = math.inf,
    least: int = LEAST_ROUNDS,
    once: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of each call in each round; all calls take part in every round, and the order rotates.

    Ends after `rounds` rounds, or when `budget_s` seconds are spent and `least` rounds are done. Those named in `once`
    take part in the first round only.
    """
    names, begin = list(calls), time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        if number >= least and time.perf_counter() - begin > budget_s:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if number == 0 or name not in once:
                seconds[name].append(timer(calls[name]))
    return seconds


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(low, high, coverage) of the interval between order statistics that holds the median of the distribution.

    The interval from the k-th smallest to the k-th largest of n independent values misses the median with probability
    2 P(B < k), B binomial(n, 1/2); k is the largest with at least `confidence`. With fewer than 6 values even the
    extremes do not reach 0.95: they are returned with the coverage that they have.
    """
    ordered, n = sorted(values), len(values)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= confidence), default=1)
    return ordered[k - 1], ordered[n - k], max(coverage(k), 0.0)


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on: device, versions, threads. Values of a GPU only where there is one."""
    facts: dict[str, Any] = {
        "device": device.type,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return facts


def gpu_facts() -> dict[str, str]:
    """Driver, power limit and clocks of the GPUs by the vendor's own tool; empty where there is none."""
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,clocks_throttle_reasons.active"
    for command in (["nvidia-smi", f"--query-gpu={query}", "--format=csv"], ["rocm-smi", "--showdriverversion"]):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            return {command[0]: done.stdout.strip()}
    return {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
