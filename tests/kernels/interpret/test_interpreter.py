"""The tests' own instrument: bfloat16 as torch computes it, and faults of memory access that it must see."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, N, OP: tl.constexpr, BLOCK: tl.constexpr) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N)
    y = tl.load(y_ptr + i, mask=i < N)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    else:
        z = tl.where(x < y, x, y)
    tl.store(out_ptr + i, z, mask=i < N)


@triton.jit
def _cast(x_ptr, out_ptr, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))


@triton.jit
def _faulty(x_ptr, FAULT: tl.constexpr) -> None:
    program = tl.program_id(0)
    i = program * 4 + tl.arange(0, 4)
    if FAULT == "out_of_bounds":
        i += 4
    elif FAULT == "write_write":
        i -= program
    elif FAULT == "read_write":
        tl.load(x_ptr + (i + 4) % 8)
    elif FAULT == "duplicates":
        i = program * 4 + tl.arange(0, 4) // 2
    elif FAULT == "overflows":
        i += (program + 1) * 2147483647 * 0
    tl.store(x_ptr + i, i.to(tl.float32))


@pytest.mark.parametrize("op", ["add", "sub", "mul", "min"])
def test_bfloat16_arithmetic_equals_torch_bit_by_bit(op: str) -> None:
    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty_like(x)
    _arithmetic[(4,)](x, y, out, 4096, OP=op, BLOCK=1024)
    expected = {"add": x + y, "sub": x - y, "mul": x * y, "min": torch.minimum(x, y)}[op]
    assert torch.equal(out, expected)


def test_casts_to_bfloat16_round_to_nearest_even() -> None:
    random = torch.randn(4088, generator=torch.Generator().manual_seed(1)) * 1e3
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])
    x = torch.cat([random, special])
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _cast[(1,)](x, out, BLOCK=4096)
    assert torch.equal(out.view(torch.int16), x.bfloat16().view(torch.int16))
    back = torch.empty_like(x)
    _cast[(1,)](out, back, BLOCK=4096)
    assert torch.equal(back, out.float())


def test_a_cast_keeps_nan() -> None:
    out = torch.empty(4, dtype=torch.bfloat16)
    _cast[(1,)](torch.full((4,), float("nan")), out, BLOCK=4)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_keeps_its_sum_in_fp32(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = torch.empty(64, 64)
    _dot[(1,)](a, b, out, BLOCK=64)
    expected = a.double() @ b.double()
    assert (out - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("fault", ["out_of_bounds", "write_write", "read_write", "duplicates", "overflows"])
def test_each_fault_is_seen(interpreter, fault: str) -> None:
    with interpreter.checks() as launches:
        _faulty[(2,)](torch.zeros(8), FAULT=fault)
    assert getattr(launches[0], fault) > 0
    assert any(fault in line for line in launches[0].faults())


def test_a_clean_launch_has_no_fault(interpreter) -> None:
    with interpreter.checks() as launches:
        _faulty[(2,)](torch.zeros(8), FAULT="none")
    assert launches[0].programs == 2
    assert launches[0].faults() == []


def test_padding_between_the_rows_of_a_view_is_out_of_bounds(interpreter) -> None:
    with interpreter.checks() as launches:
        _faulty[(2,)](torch.zeros(2, 5)[:, :4], FAULT="none")
    assert launches[0].out_of_bounds == 1
