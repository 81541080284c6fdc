"""The checks are worth something only if they fail: each fault below, planted in a kernel's source, must be caught."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import muonlm_kernels.gpu

SOURCES = Path(muonlm_kernels.gpu.__file__).parent
MIRROR = 'store_block(c_ptr, tl.trans(tile), col, row, M, stride_cm, stride_cn, "all", BLOCK_N, BLOCK_M)'

# name: (module, text of the source, text in its place)
FAULTS = {
    "mirror image missing": ("symmetric", MIRROR, "pass"),
    "mirror image not transposed": ("symmetric", MIRROR, MIRROR.replace("tl.trans(tile)", "tile")),
    "sum not masked at its end": ("symmetric", "(cols[None, :] < M) & (ns[:, None] < N - start)", "cols[None, :] < M"),
    "sum kept in the type of the result": (
        "symmetric",
        'input_precision="ieee")',
        'input_precision="ieee").to(c_ptr.dtype.element_ty).to(tl.float32)',
    ),
    "stride between matrices lost": ("symmetric", "b_ptr + matrix * stride_bk", "b_ptr"),
    "store not masked": ("symmetric", "tile, mask=mask)", "tile)"),
    "folded row off by one": ("symmetric", "fold_col - 1", "fold_col"),
    "32-bit offset of a matrix": ("symmetric", "(program // programs).to(tl.int64)", "program // programs"),
    "32-bit offset of a row": ("symmetric", "rows.to(tl.int64) * stride_cm", "rows * stride_cm"),
    "two programs write one tile": ("symmetric", "+ within // GROUP)", "+ 0)"),
    "diagonal written twice": ("symmetric", "mask & (rows > cols)", "mask & (rows >= cols)"),
    "diagonal tile taken for one above it": ("symmetric", "if row + BLOCK_M <= col:", "if row < col + BLOCK_M:"),
    "factor forgotten": ("symmetric", "acc *= alpha", "pass"),
    "addend from the wrong matrix": ("symmetric", "d_ptr + matrix * stride_dk", "d_ptr"),
    "factors swapped": ("update", "exact += beta * tl.load(x_ptr", "exact += alpha * tl.load(x_ptr"),
    "operand transposed": (
        "update",
        "[:, None] * stride_bm + ks[None, :] * stride_bn",
        "[:, None] * stride_bn + ks[None, :] * stride_bm",
    ),
    "last band too high": ("update", "tl.minimum(tiles_m - band * GROUP, GROUP)", "GROUP"),
    "result not masked": ("update", "y_offset, y, mask=inside)", "y_offset, y)"),
    "result of the wrong matrix": ("update", "y_ptr += matrix * stride_yk", "pass"),
    "halves swapped": ("update", "alpha * halves[half]", "alpha * halves[1 - half]"),
    "carried rounding not added": ("update", "exact += gain * tl.load", "exact += 0 * tl.load"),
    "carried rounding by the wrong factor": ("update", "exact += gain * tl.load", "exact += beta * tl.load"),
    "carried rounding not replaced": ("update", "exact - y.to(tl.float32)", "tl.load(lo_ptr + x_offset, mask=inside)"),
    "padding not written": ("elementwise", "stored_y, mask=stored)", "stored_y, mask=given)"),
    "padding of what is carried not written": ("elementwise", "element_ty), mask=stored)", "element_ty), mask=given)"),
    "rounding of the wrong sign": ("elementwise", "(y - stored_y.to(tl.float32))", "(stored_y.to(tl.float32) - y)"),
    "descriptor of the wrong matrix": ("tma", "a_desc.load([index, row", "a_desc.load([0, row"),
    "descriptor of the wrong columns": ("tma", "x_desc.load([index, start, col])", "x_desc.load([index, start, 0])"),
    "norm of the value before rounding": ("elementwise", "add_squares(stored_u.to(tl.float32)", "add_squares(u"),
    "sum of squares scaled once": ("elementwise", "squares * ratio * ratio +", "squares * ratio +"),
    "partial norms scaled once": ("elementwise", "squares * ratio * ratio, axis", "squares * ratio, axis"),
    "bad matrix not masked": ("elementwise", "y = tl.where(usable, y, 0.0)", "y = y"),
    "NaN passes the maximum": (
        "elementwise",
        'tl.where(magnitude < float("inf"), magnitude, float("inf"))',
        "magnitude",
    ),
    "tiles read by every program": ("elementwise", "for tile in range(part,", "for tile in range(0,"),
    "momentum used before rounding": ("elementwise", "u = stored_m.to(tl.float32)", "u = m"),
    "root forgotten": ("elementwise", "tl.sqrt(tl.where(usable, squares, 1.0))", "tl.where(usable, squares, 1.0)"),
    "flags of one matrix": ("elementwise", "finite_ptr + matrix", "finite_ptr"),
}


def _module(name: str, text: str, directory: Path) -> ModuleType:
    """A fresh module of the text; the interpreter reads the source of kernels from its file."""
    path = directory / f"planted_{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["symmetric", "update", "tma", "elementwise"])
def test_the_source_as_it_is_passes(interpreter, kernel_checks, tmp_path: Path, name: str) -> None:
    module = _module(name, (SOURCES / f"{name}.py").read_text(), tmp_path)
    kernel_checks.check_module(name, module, interpreter)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(interpreter, kernel_checks, tmp_path: Path, fault: str) -> None:
    name, shipped, planted = FAULTS[fault]
    text = (SOURCES / f"{name}.py").read_text()
    assert shipped in text
    module = _module(name, text.replace(shipped, planted), tmp_path)
    with pytest.raises(AssertionError) as caught:
        kernel_checks.check_module(name, module, interpreter)
    print(f"{fault}: {str(caught.value).splitlines()[0]}")
