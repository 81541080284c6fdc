"""What each kernel must do, as functions of the module that holds it: run on the shipped source and on planted faults.

Each check launches small ragged cases under `checks`, with NaN in the results and in all padding beforehand, and raises
AssertionError where a value is wrong, memory is accessed wrongly, or an element is written more than once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from muonlm_kernels.gpu.configs import KernelConfig
from muonlm_kernels.gpu.padding import padded

# Largest error of one rounding: relative, and absolute for the smallest numbers of the type.
ROUNDING = {torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.float32: (2.0**-24, 0.0)}


def config(kernel: str, block_m: int, block_n: int, block_k: int = 32, **extra: int) -> KernelConfig:
    return KernelConfig(kernel, block_m, block_n, block_k, 4, 1, extra)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """A NaN tensor (K, M, N): "contiguous", "padded" (gaps after rows and matrices) or "transposed" (padded, too)."""
    batch, rows, cols = shape
    if layout == "contiguous":
        return torch.full(shape, float("nan"), dtype=dtype)
    if layout == "transposed":
        return torch.full((batch, cols + 1, rows + 8), float("nan"), dtype=dtype)[:, :cols, :rows].mT
    return torch.full((batch, rows + 1, cols + 8), float("nan"), dtype=dtype)[:, :rows, :cols]


def random(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return poisoned(shape, dtype, layout).copy_(values)


def assert_rounded(out: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """`out` is `exact` (float64) rounded once to its type, but for the error of an fp32 sum of `terms` terms."""
    relative, absolute = ROUNDING[out.dtype]
    bound = 1.01 * relative * exact.abs() + absolute + 2.0**-24 * terms * exact.abs().max()
    assert not out.isnan().any(), "an element was not written, or NaN was read"
    worst = ((out.double() - exact).abs() / bound).max()
    assert worst <= 1, f"{worst:.3g} times the error of one rounding"


def assert_clean(launches: list[Any]) -> None:
    for launch in launches:
        assert not launch.faults(), launch.faults()
        assert launch.rewritten == 0, f"{launch.kernel} wrote {launch.rewritten} elements more than once"


SYMMETRIC_CASES = [
    # batch, rows, cols, dtype, layout, addend, tile
    (2, 33, 40, torch.bfloat16, "contiguous", False, config("symmetric", 32, 32, group=1)),
    (1, 80, 72, torch.float16, "padded", True, config("symmetric", 32, 32, group=2)),
    (2, 129, 24, torch.bfloat16, "transposed", True, config("symmetric", 32, 64, group=1)),
    (1, 144, 33, torch.float16, "contiguous", False, config("symmetric", 32, 64, group=2)),
    (2, 1, 5, torch.bfloat16, "contiguous", True, config("symmetric", 32, 32, group=1)),
]


def check_symmetric(module: ModuleType, interpreter: ModuleType, case: tuple[Any, ...]) -> None:
    """alpha A B^T + beta D of the upper triangle, mirrored. A and B differ, so the other half would be another one."""
    batch, rows, cols, dtype, layout, with_addend, tile = case
    a = random((batch, rows, cols), dtype, layout, 0)
    b = random((batch, rows, cols), dtype, "padded", 1)
    d = random((batch, rows, rows), dtype, layout, 2) if with_addend else None
    out = poisoned((batch, rows, rows), dtype, "padded")
    with interpreter.checks() as launches:
        getattr(module, tile.kernel)(a, b, out, tile, addend_KMM=d, alpha=0.75, beta=-1.5)
    exact = 0.75 * (a.double() @ b.double().mT)
    if d is not None:
        exact -= 1.5 * d.double()
    assert_rounded(out, exact.triu() + exact.triu(1).mT, cols)
    assert torch.equal(out, out.mT), "not symmetric"
    assert_clean(launches)


UPDATE_CASES = [
    # batch, rows, cols, dtype, layout of the result, beta, tile
    (2, 33, 72, torch.bfloat16, "padded", 3.5, config("update", 32, 32, group=1)),
    (1, 80, 144, torch.float16, "transposed", -1.5, config("update", 32, 64, group=2)),
    (2, 65, 5, torch.float16, "contiguous", 0.0, config("update", 32, 32, group=2)),
    (1, 1, 9, torch.bfloat16, "contiguous", 2.0, config("update", 32, 32, group=1)),
]


TMA_SYMMETRIC_CASES = [
    (2, 40, 24, torch.bfloat16, "contiguous", True, config("symmetric_tma", 32, 32, group=2)),
    (1, 136, 72, torch.float16, "padded", False, config("symmetric_tma", 32, 64, group=1)),
]
TMA_UPDATE_CASES = [
    (2, 40, 72, torch.bfloat16, "transposed", 3.5, config("update_tma", 32, 64, group=2)),
    (1, 72, 24, torch.float16, "padded", 0.0, config("update_tma", 32, 32, group=1)),
]


def check_update(module: ModuleType, interpreter: ModuleType, case: tuple[Any, ...]) -> None:
    """alpha B X + beta X; B is not symmetric here, so that a transposed one would show."""
    batch, rows, cols, dtype, layout, beta, tile = case
    b = random((batch, rows, rows), dtype, "padded", 3)
    x = random((batch, rows, cols), dtype, "padded", 4)
    out = poisoned((batch, rows, cols), dtype, layout)
    with interpreter.checks() as launches:
        getattr(module, tile.kernel)(b, x, out, tile, alpha=0.75, beta=beta)
    assert_rounded(out, 0.75 * (b.double() @ x.double()) + beta * x.double(), rows)
    assert_clean(launches)


def check_carried_rounding(module: ModuleType, interpreter: ModuleType, kernel: str) -> None:
    """alpha B X + beta X + gain lo with its rounding in lo: together they are far nearer than a rounding."""
    rows, cols, tile = 40, 72, config(kernel, 32, 32, group=1)
    b = random((2, rows, rows), torch.bfloat16, "contiguous", 3)
    x = random((2, rows, cols), torch.bfloat16, "padded", 4)
    lo = random((2, rows, cols), torch.bfloat16, "padded", 8).mul_(2.0**-9)
    exact = b.double() @ x.double() - 1.5 * x.double() + 3.5 * lo.double()
    out = poisoned((2, rows, cols), torch.bfloat16, "transposed")
    with interpreter.checks() as launches:
        getattr(module, kernel)(b, x, out, tile, beta=-1.5, lo_KMN=lo, gain=3.5)
    assert_rounded(out, exact, rows)
    worst = (out.double() + lo.double() - exact).abs().max() / exact.abs().max()
    assert worst < 2.0**-16, f"result and carried rounding are {worst:.2g} from the sum"
    assert_clean(launches)


def _combined(partials: torch.Tensor) -> torch.Tensor:
    amax, squares = partials.double().unbind(1)
    return (amax.square() * squares).sum(1).sqrt()


NORMALIZE_CASES = [
    # scale of the entries, rows, cols, type read, type written, layout read; the result is contiguous and padded
    (1.0, 33, 72, torch.bfloat16, torch.bfloat16, "contiguous"),
    (1e-35, 40, 70, torch.float32, torch.float16, "transposed"),
    (1e35, 70, 65, torch.float32, torch.bfloat16, "padded"),
    (1e-3, 1, 9, torch.float16, torch.float16, "contiguous"),
]


def check_normalize(module: ModuleType, interpreter: ModuleType, case: tuple[Any, ...]) -> None:
    """Five matrices: two to be normalized, a zero one, one with NaN, one with infinity, each with its flag."""
    scale, rows, cols, dtype, out_dtype, layout = case
    x = random((5, rows, cols), dtype, layout, 5)
    # Magnitudes of successive tiles differ, so that the sums must be brought to a common scale; a ratio that the
    # narrower types can hold.
    x.mul_(scale * torch.logspace(0, -2, rows)[None, :, None])
    x[1] *= 0.125
    x[2] = 0
    x[3, -1, -1] = float("nan")
    x[4, 0, -1] = -float("inf")
    out = poisoned(padded(5, rows, cols), out_dtype, "contiguous")
    with interpreter.checks() as launches:
        partials = module.stats(x, config("stats", 32, 32, 0, max_parts=4))
        lo = torch.full_like(out, float("nan"), dtype=torch.bfloat16)
        finite = module.scale_cast(x, partials, out, config("scale_cast", 32, 64, 0, max_parts=4), lo_KMN=lo)
    norms = x[:2].double().norm(dim=(1, 2))
    torch.testing.assert_close(_combined(partials)[:2], norms, rtol=1e-5, atol=0)
    assert finite.tolist() == [True, True, True, False, False], f"finite: {finite.tolist()}"
    exact = torch.zeros(out.shape, dtype=torch.float64)
    exact[:2, :rows, :cols] = x[:2].double() / norms[:, None, None]
    assert_rounded(out, exact, 64)
    carried = (out.double() + lo.double() - exact).abs().max() / exact.abs().max()
    assert carried < 2.0**-16, f"result and carried rounding are {carried:.2g} from the quotient"
    for stored in (out, lo):
        assert not stored[2:].any(), "a matrix without a direction did not give zeros"
        assert not stored[:, rows:].any(), "padding is not zero"
        assert not stored[:, :, cols:].any(), "padding is not zero"
    assert_clean(launches)


MOMENTUM_CASES = [
    # type of the gradient, of the momentum, of the update; EMA or sum; Nesterov; layout of the gradient
    (torch.bfloat16, torch.float32, torch.bfloat16, True, True, "padded"),
    (torch.float32, torch.bfloat16, torch.bfloat16, False, True, "transposed"),
    (torch.float32, torch.float32, torch.float32, True, False, "contiguous"),
]


def check_momentum(module: ModuleType, interpreter: ModuleType, case: tuple[Any, ...]) -> None:
    """Momentum and update against float64, norms of what is stored, and the same bits in a second run."""
    grad_dtype, momentum_dtype, out_dtype, ema, nesterov, layout = case
    shape, beta = (2, 33, 70), 0.95
    weight = 1 - beta if ema else 1.0
    tile = config("momentum", 16, 32, 0, max_parts=4)
    grad = random(shape, grad_dtype, layout, 6)
    before = random(shape, momentum_dtype, "padded", 7)
    results = []
    for _ in range(2):
        after, update = poisoned(shape, momentum_dtype, "padded").copy_(before), poisoned(shape, out_dtype, "padded")
        with interpreter.checks() as launches:
            partials = module.momentum(grad, after, update, tile, beta=beta, weight=weight, nesterov=nesterov)
        assert_clean(launches)
        results.append((after, update, partials))
    assert all(torch.equal(first, second) for first, second in zip(*results)), "differs from run to run"
    assert_rounded(after, beta * before.double() + weight * grad.double(), 4)
    exact = beta * after.double() + weight * grad.double() if nesterov else after.double()
    assert_rounded(update, exact, 4)
    torch.testing.assert_close(_combined(partials), update.double().norm(dim=(1, 2)), rtol=1e-6, atol=0)


def check_symmetric_offsets(module: ModuleType, interpreter: ModuleType) -> None:
    """Offsets beyond 2^31 elements: strides that no tensor here has, so accesses are only looked at, never made."""
    x = torch.zeros(1, dtype=torch.bfloat16)
    far = (1 << 30, 1 << 29, 1)
    with interpreter.checks() as launches:
        module.symmetric_kernel[(9,)](
            x, x, x, x, 40, 8, 1.0, 1.0, *far * 4, HAS_D=True, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, GROUP=1
        )
    assert launches[0].overflows == 0, launches[0].faults()
    assert launches[0].out_of_bounds > 0, "nothing was accessed"


def check_update_offsets(module: ModuleType, interpreter: ModuleType) -> None:
    """As `check_symmetric_offsets`."""
    x = torch.zeros(1, dtype=torch.bfloat16)
    far = (1 << 30, 1 << 29, 1)
    with interpreter.checks() as launches:
        module.update_kernel[(6,)](
            x,
            x,
            x,
            x,
            40,
            8,
            1.0,
            1.0,
            1.0,
            *far * 3,
            CARRY=True,
            BLOCK_M=32,
            BLOCK_N=32,
            BLOCK_K=16,
            GROUP=1,
        )
    assert launches[0].overflows == 0, launches[0].faults()
    assert launches[0].out_of_bounds > 0, "nothing was accessed"


def check_module(name: str, module: ModuleType, interpreter: ModuleType) -> None:
    """Every check of one module of the kernels."""
    if name == "symmetric":
        for case in SYMMETRIC_CASES:
            check_symmetric(module, interpreter, case)
        check_symmetric_offsets(module, interpreter)
    elif name == "update":
        for case in UPDATE_CASES:
            check_update(module, interpreter, case)
        check_carried_rounding(module, interpreter, "update")
        check_update_offsets(module, interpreter)
    elif name == "tma":
        for case in TMA_SYMMETRIC_CASES:
            check_symmetric(module, interpreter, case)
        for case in TMA_UPDATE_CASES:
            check_update(module, interpreter, case)
        check_carried_rounding(module, interpreter, "update_tma")
    else:
        for case in NORMALIZE_CASES:
            check_normalize(module, interpreter, case)
        for case in MOMENTUM_CASES:
            check_momentum(module, interpreter, case)
