"""Does this device multiply bfloat16 matrices faster than float32 ones? Measured once a process, in about 0.1 s."""

from __future__ import annotations

import time
from functools import cache

import torch

_SIZE = 512  # large enough that the multiplication outweighs its call, small enough for a few in milliseconds
_REPEATS = 7
_LIMIT_S = 0.06
_FAST = 1.3  # CPUs with bf16 units reach 2 to 8, those without stay well below 1: nothing real lies near this


@cache
def matmul_tflops(dtype: torch.dtype, device: torch.device, threads: int = 0) -> float:
    """Rate of a 512 x 512 x 512 matrix product in TFLOP/s, counted as 2*M*N*K; the best of a few, 0 if unsupported.

    `threads` is the number of CPU threads, 0 the present one. Leaves threads, random state and autocast as they were.
    """
    before = torch.get_num_threads()
    try:
        if threads and device.type == "cpu":
            torch.set_num_threads(threads)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            seconds = _best_seconds(torch.ones(_SIZE, _SIZE, dtype=dtype, device=device))
    except RuntimeError:
        return 0.0
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
    return 2 * _SIZE**3 / seconds / 1e12


def _best_seconds(matrix: torch.Tensor) -> float:
    """The shortest time, as others share the machine and that only makes it longer; the first call warms up.

    A type without fast instructions takes so long that its first call is enough to tell.
    """
    end = time.perf_counter() + _LIMIT_S
    times = [_seconds(matrix)]
    while len(times) <= _REPEATS and time.perf_counter() < end:
        times.append(_seconds(matrix))
    return min(times)


def _seconds(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    _wait(matrix.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether "auto" precision takes bfloat16: on a GPU that has it natively, and on a CPU where it measures faster.

    The CPU is measured with one thread, so that ranks that share the machine come to the same answer.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return matmul_tflops(torch.bfloat16, device, 1) > _FAST * matmul_tflops(torch.float32, device, 1)
