"""Every shipped configuration, compiled for its target: resources within limits, the instructions that were meant.

`registers.json` holds the registers of each, by one version of Triton; other versions are not held to it. To renew it
after a change of kernels, configurations or Triton: `PYTHONPATH=kernels python tests/kernels/aot/test_shipped.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("compiling needs a process without TRITON_INTERPRET=1", allow_module_level=True)

from muonlm_kernels.gpu import compiled, configs  # noqa: E402

pytestmark = pytest.mark.aot

BASELINE = Path(__file__).with_name("registers.json")
# Warps get registers in units of 8, and scheduling shifts a few with unrelated changes.
TOLERANCE = 8
PRODUCTS = ("symmetric", "update")
SHIPPED = [(target, kernel) for target in configs.TARGETS for kernel in configs.shipped(target)]


def label_of(value: object) -> str:
    return value if isinstance(value, str) else value.label.replace(" ", "-")


@pytest.fixture(scope="module")
def baseline():
    return json.loads(BASELINE.read_text())


@pytest.mark.parametrize(("target", "kernel"), SHIPPED, ids=label_of)
def test_a_shipped_kernel_fits_its_target(target, kernel, baseline):
    row = compiled.compile_kernel(kernel, target)
    assert row.problems == []
    assert row.residency.programs >= 1
    product, by_descriptor = kernel.label.startswith(PRODUCTS), "_tma" in kernel.label
    assert row.multiplies == product
    assert (row.matmuls > 0) == product
    assert (row.tma_ops > 0) == by_descriptor
    # Pipelined loads of the pointer forms; CDNA 3 has none that bypass registers.
    assert (row.async_copies > 0) == (product and not by_descriptor and target != "gfx942")
    if baseline["triton"] == triton.__version__:
        before = baseline["registers"][target].get(kernel.label)
        assert before is not None, f"{BASELINE.name} lacks it; see the head of this file"
        assert row.registers <= before + TOLERANCE


def test_the_baseline_is_of_what_is_shipped(baseline):
    assert {target: list(by_label) for target, by_label in baseline["registers"].items()} == {
        target: [kernel.label for kernel in configs.shipped(target)] for target in configs.TARGETS
    }


@pytest.mark.parametrize("target", configs.TARGETS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_tile_of_large_matrices_fits_in_fp16_too(target, product):
    name = str(configs.pick(target, product, batch=1, rows=8192, cols=8192))
    kernels = [kernel for kernel in configs.shipped(target, "fp16") if kernel.label.rpartition(" ")[0] == name]
    assert kernels
    for kernel in kernels:
        row = compiled.compile_kernel(kernel, target)
        assert row.problems == []
        assert "BF16" not in row.matmul.upper()


def renew() -> None:
    """Writes `registers.json`."""
    registers = {target: {} for target in configs.TARGETS}
    for target, kernel in SHIPPED:
        registers[target][kernel.label] = compiled.compile_kernel(kernel, target).registers
    BASELINE.write_text(json.dumps({"triton": triton.__version__, "registers": registers}, indent=1) + "\n")


if __name__ == "__main__":
    renew()
