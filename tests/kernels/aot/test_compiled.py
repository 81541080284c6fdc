"""What `compile_kernel` and the table report of kernels that must not be shipped, and the arithmetic of residency."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("compiling needs a process without TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402

from muonlm_kernels.bench.__main__ import main  # noqa: E402
from muonlm_kernels.gpu import compiled, configs  # noqa: E402
from muonlm_kernels.gpu.compiled import Compiled, compile_kernel  # noqa: E402

pytestmark = pytest.mark.aot


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, N, BLOCK: tl.constexpr) -> None:
    """C = A B of (N, N) matrices, N a multiple of BLOCK, one tile a program, in the precision of the operands."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + rows[:, None] * N + inner[None, :])
        b = tl.load(b_ptr + inner[:, None] * N + cols[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], acc)


@triton.jit
def specialized_kernel(a_ptr, b_ptr, c_ptr, N, BLOCK: tl.constexpr) -> None:
    """`product_kernel` for one tile of C, with specialized warps, for which one warp group is too few."""
    index = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in tl.range(0, N, BLOCK, warp_specialize=True):
        a = tl.load(a_ptr + index[:, None] * N + (start + index)[None, :])
        b = tl.load(b_ptr + (start + index)[:, None] * N + index[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + index[:, None] * N + index[None, :], acc)


def product(fn=product_kernel, *, operand="*bf16", warps=4) -> configs.ShippedKernel:
    signature = {"a_ptr": operand, "b_ptr": operand, "c_ptr": "*fp32", "N": "i32", "BLOCK": "constexpr"}
    divisible = ("a_ptr", "b_ptr", "c_ptr", "N")
    return configs.ShippedKernel("product", fn, signature, {"BLOCK": 64}, divisible, warps, 2, 2.0**30, 2.0**20)


def row(**figures) -> Compiled:
    """A product for an H100 without problems, but for `figures`."""
    plain = Compiled(
        label="x",
        target="sm_90",
        threads=256,
        registers=128,
        spill_bytes=0,
        shared_bytes=98304,
        tensor_columns=0,
        multiplies=True,
        matmul="HGMMA.64x128x16.F32.BF16",
        matmuls=4,
        tma_ops=6,
        async_copies=0,
        flops=989e9,
        bytes=3.35e6,
    )
    return replace(plain, **figures)


def rejected_configs():
    for target in configs.TARGETS:
        labels = {kernel.label.rpartition(" ")[0] for kernel in compiled.rejected(target)}
        yield from ((target, label) for label in sorted(labels))


@pytest.mark.parametrize(("target", "label"), rejected_configs())
def test_tiles_that_are_not_shipped_have_a_problem(target, label):
    kernels = [kernel for kernel in compiled.rejected(target) if kernel.label.startswith(label)]
    assert any(compile_kernel(kernel, target).problems for kernel in reversed(kernels))


def test_a_spilling_tile_is_reported():
    (kernel,) = (k for k in compiled.rejected("sm_80") if k.label.startswith("symmetric 256x256") and "poly" in k.label)
    found = compile_kernel(kernel, "sm_80")
    assert found.spill_bytes > 256
    assert found.problems == [f"spills {found.spill_bytes} B of registers a thread"]


def test_too_much_shared_memory_is_reported():
    (kernel,) = (k for k in compiled.rejected("sm_90") if "128x256x128" in k.label and "wide" in k.label)
    found = compile_kernel(kernel, "sm_90")
    assert found.shared_bytes > 3 * (128 + 256) * 128 * 2 - 1
    assert found.residency.programs == 0
    assert found.problems == [f"{found.shared_bytes} B of shared memory, H100 has 232448"]


@pytest.mark.parametrize(("target", "expected"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
def test_a_product_without_matrix_instructions_is_reported(target, expected):
    found = compile_kernel(product(operand="*fp32"), target)
    assert found.multiplies
    assert found.problems == [f"multiplies by scalar instructions instead of {expected}"]


def test_a_product_by_the_instructions_of_an_older_target_is_reported():
    found = compile_kernel(product(warps=2), "sm_90")  # a warp group has four
    assert found.matmul.startswith("HMMA")
    assert found.problems == [f"multiplies by {found.matmul} instead of HGMMA"]


def test_instructions_are_counted_with_and_without_predicates():
    lines = [
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;",
        "        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5+0x2000], desc[UR6][R2.64], P1 ;",
        "        /*1a20*/              @UP1 UTMALDG.3D [UR8], [UR4] ;",
        "        /*1a30*/              @!PT LDGSTS.E.BYPASS.128 [R5+0x4000], desc[UR6][R2.64] ;",
        ".L_x_1:",
        "        /*1a40*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24 ;",
    ]
    assert compiled.sass_instructions("\n".join(lines)) == {
        "LDC": 1,
        "LDGSTS.E.BYPASS.128": 2,
        "UTMALDG.3D": 1,
        "HGMMA.64x256x16.F32.BF16": 1,
    }


@pytest.mark.parametrize("target", configs.TARGETS)
def test_the_same_product_in_bf16_is_not(target):
    found = compile_kernel(product(), target)
    assert found.problems == []
    assert found.threads == 4 * compiled.TARGETS[target].gpu.warp_size
    assert found.tma_ops == 0


def test_a_kernel_that_does_not_compile_is_one_line(capfd):
    with pytest.raises(compiled.CompilationError, match=r"^product for sm_90: .+") as caught:
        compile_kernel(product(specialized_kernel), "sm_90")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_unknown_targets_and_interpreting_processes_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="unknown target 'sm_70'"):
        compile_kernel(product(), "sm_70")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        compile_kernel(product(), "sm_90")


@pytest.mark.parametrize(
    ("figures", "programs", "share", "limit"),
    [
        ({}, 2, 0.25, "registers"),
        ({"registers": 129}, 1, 0.125, "registers"),
        ({"registers": 168, "threads": 384}, 1, 0.1875, "registers"),
        ({"registers": 32, "shared_bytes": 0}, 8, 1.0, "warps"),
        ({"registers": 40, "shared_bytes": 0}, 6, 0.75, "registers"),
        ({"registers": 64, "shared_bytes": 58 * 1024}, 3, 0.375, "shared memory"),
        ({"registers": 64, "shared_bytes": 114 * 1024}, 1, 0.125, "shared memory"),  # each costs 1 kB more
        ({"target": "sm_100", "registers": 64, "tensor_columns": 256}, 2, 0.25, "shared memory"),
        ({"target": "sm_100", "registers": 64, "tensor_columns": 512}, 1, 0.125, "tensor memory"),
        ({"target": "sm_80", "shared_bytes": 65536, "threads": 128, "registers": 255}, 2, 0.125, "registers"),
        ({"target": "gfx942", "threads": 512, "registers": 128, "shared_bytes": 32768}, 2, 0.5, "registers"),
        ({"target": "gfx942", "threads": 512, "registers": 138, "shared_bytes": 32768}, 1, 0.25, "registers"),
        ({"target": "gfx942", "threads": 256, "registers": 62, "shared_bytes": 8192}, 8, 1.0, "warps"),
    ],
)
def test_residency(figures, programs, share, limit):
    assert row(**figures).residency == compiled.Residency(programs, share, limit)


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        ({"spill_bytes": 8}, "spills 8 B"),
        ({"shared_bytes": 232449}, "232449 B of shared memory, H100 has 232448"),
        ({"target": "gfx942", "matmul": "v_mfma_f32_32x32x8_bf16", "shared_bytes": 65537}, "MI300X has 65536"),
        ({"target": "sm_100", "matmul": "UTCHMMA", "tensor_columns": 513}, "513 columns of tensor memory"),
        ({"threads": 1024}, "1024 threads of 128 registers do not fit"),
        ({"matmul": ""}, "multiplies by scalar instructions"),
    ],
)
def test_each_limit_is_checked(figures, problem):
    assert row().problems == []
    found = row(**figures).problems
    assert [problem in line for line in found] == [True]


def test_the_floor_is_the_slower_of_compute_and_memory():
    assert row().floor_s == pytest.approx(1e-3)
    assert row(bytes=3.35e10).floor_s == pytest.approx(1e-2)


def test_the_table_has_a_row_for_each_kernel(capsys, tmp_path):
    out = tmp_path / "rows.json"
    assert main(["compiled", "--target", "sm_80", "gfx942", "--kernel", "stats", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("| stats") == 2
    assert "2 shipped configurations, no problem" in text
    written = json.loads(out.read_text())
    assert written["problems"] == []
    assert [entry["target"] for entry in written["rows"]] == ["sm_80", "gfx942"]
    assert all(entry["resident_programs"] >= 1 and entry["floor_s"] > 0 for entry in written["rows"])


def test_the_table_fails_for_a_shipped_kernel_with_a_problem(monkeypatch, capsys):
    broken = replace(product(specialized_kernel), label="broken")
    monkeypatch.setattr(configs, "shipped", lambda target, dtype: [product(operand="*fp32"), broken])
    assert main(["compiled", "--target", "sm_90"]) == 1
    text = capsys.readouterr().out
    assert "product for sm_90: multiplies by scalar instructions instead of HGMMA" in text
    assert "broken for sm_90: " in text


def test_the_table_says_when_no_kernel_is_meant(capsys):
    assert main(["compiled", "--target", "sm_80", "--kernel", "nothing"]) == 2
    assert "no kernel starts with 'nothing'" in capsys.readouterr().err
