"""Sizes of the matrices that the products of an iteration work on; needs no triton."""

from __future__ import annotations

from typing import Final

# Triton compiles a kernel once more for sizes and strides that are no multiples of 16: with narrower loads, which are
# not pipelined, and spilled registers. Tensor descriptors cannot hold rows that start off 16 bytes at all.
MULTIPLE: Final = 16


def padded(batch: int, rows: int, cols: int) -> tuple[int, int, int]:
    """The size of a stack (K, M, N) with M and N rounded up to multiples of `MULTIPLE`.

    Rows and columns of zeros stay zero through a Newton-Schulz step, and change nothing else.
    """
    return batch, -(-rows // MULTIPLE) * MULTIPLE, -(-cols // MULTIPLE) * MULTIPLE
