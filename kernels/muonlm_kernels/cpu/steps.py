"""The steps on one matrix, from the first X X^T on, as products into buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from muonlm_kernels.coefficients import Triple
from muonlm_kernels.cpu.buffers import Buffers, outside_of_modes


def plain_steps(buffers: Buffers, triples: tuple[Triple, ...], scale: float, out_MN: torch.Tensor) -> None:
    """One step after another, from X X^T on; as few Python instructions as possible, for small matrices."""
    (gram, _), (q, q_diagonal) = buffers.squares[:2]
    x, x_t, y, y_t = buffers.x, buffers.x_t, buffers.y, buffers.y_t
    a, b, c = triples[0]
    torch.addmm(gram, gram, gram, beta=b * scale**3, alpha=c * scale**5, out=q)
    q_diagonal.add_(_dithered(a * scale, q.shape[0], q.dtype))
    torch.mm(q, x, out=y if len(triples) > 1 else out_MN)
    for index, offsets in enumerate(_offsets(triples, q.shape[0], q.dtype), start=1):
        x, x_t, y, y_t = y, y_t, x, x_t
        _, b, c = triples[index]
        torch.mm(x, x_t, out=gram)
        torch.addmm(gram, gram, gram, beta=b, alpha=c, out=q) if c else torch.mul(gram, b, out=q)
        q_diagonal.add_(offsets)
        torch.mm(q, x, out=y if index + 1 < len(triples) else out_MN)


def grouped_steps(
    buffers: Buffers,
    triples: Sequence[Triple],
    groups: Sequence[int],
    blocks: int,
    scale: float,
    out_MN: torch.Tensor,
    unrounded: torch.Tensor | None,
    num_compensated: int,
) -> None:
    """Steps in groups that share one X X^T, from the first X X^T on.

    The first `num_compensated` steps add `unrounded`, in fp32, instead of X.
    """
    gram, first = buffers.squares[0][0], 0
    x, x_t, y, y_t = buffers.x, buffers.x_t, buffers.y, buffers.y_t
    for group in groups:
        if first:
            symmetric_product(x, x_t, gram, blocks)
        is_compensated = unrounded is not None and first < num_compensated
        q = _polynomial(buffers.squares, triples[first : first + group], scale, blocks, is_compensated)
        target = out_MN if first + group == len(triples) else y
        torch.mm(q, x, out=target)
        if unrounded is not None and is_compensated:
            # What the product lost in rounding: the sum is made in fp32.
            lost = torch.addmm(target, q, x, beta=-1)
            unrounded = unrounded.mul(triples[first][0] * scale).add_(target).add_(lost)
            target.copy_(unrounded)
        first, scale = first + group, 1.0
        x, x_t, y, y_t = y, y_t, x, x_t


def _polynomial(
    squares: Sequence[tuple[torch.Tensor, torch.Tensor]],
    triples: Sequence[Triple],
    scale: float,
    blocks: int,
    is_compensated: bool,
) -> torch.Tensor:
    """The matrix Q with which one or two steps multiply X, from A = X X^T in squares[0], whose X lacks `scale`.

    For a compensated step it is b A + c A^2, without a I.
    """
    (gram, _), (q, q_diagonal), (product, _), (next_gram, _), (next_q, next_q_diagonal) = squares
    square = scale * scale
    factor = scale if len(triples) == 1 else 1.0  # the last polynomial makes good for the missing scale of X itself
    a, b, c = triples[0]
    symmetric_product(gram, gram, q, blocks, gram, b * square * factor, c * square * square * factor)
    if not is_compensated:
        q_diagonal.add_(_dithered(a * factor, q.shape[0], q.dtype))
    if len(triples) == 1:
        return q
    symmetric_product(gram, q, product, blocks)
    symmetric_product(product, q, next_gram, blocks)
    a2, b, c = triples[1]
    symmetric_product(next_gram, next_gram, next_q, blocks, next_gram, b * square * scale, c * square * square * scale)
    next_q_diagonal.add_(_dithered(a2 * scale, q.shape[0], q.dtype))
    symmetric_product(next_q, q, product, blocks)
    return product


def _dithered(value: float, size: int, dtype: torch.dtype) -> torch.Tensor:
    """`value` for each row, with an offset of up to a quarter unit in the last place of `dtype` that differs by row.

    The diagonal of Q is nearly the same number in all rows. Rounded in the same direction everywhere, it would change
    the coefficient a by up to 2^-9; so, where it is about half-way, some rows round up and some down.
    """
    return _dither(size, dtype).mul(2.0 ** math.frexp(value)[1]).add_(value)


@lru_cache(maxsize=256)
def _dither(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Offsets for values of [1/2, 1): multiples of the golden ratio, which fill an interval evenly from any start."""
    golden = (math.sqrt(5) - 1) / 2
    with outside_of_modes():
        steps = torch.arange(size, dtype=torch.float64, device="cpu")
        offsets = ((steps * golden) % 1 - 0.5) * (torch.finfo(dtype).eps / 4)
        return offsets if dtype == torch.float64 else offsets.float()


@lru_cache(maxsize=256)
def _offsets(triples: tuple[Triple, ...], size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What is added to the diagonal of Q in the second step and those after it."""
    with outside_of_modes():
        return [_dithered(a, size, dtype) for a, _, _ in triples[1:]]


def symmetric_product(
    left: torch.Tensor,
    right: torch.Tensor,
    out_MM: torch.Tensor,
    blocks: int,
    bias: torch.Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> None:
    """alpha * left @ right + beta * bias, known to be symmetric, into `out_MM`; the upper blocks are multiplied."""
    size = out_MM.shape[0]
    step = -(-size // blocks)
    for begin in range(0, size, step):
        if blocks > 1:
            rows, columns = slice(begin, begin + step), slice(begin, None)
            target, first, second = out_MM[rows, columns], left[rows], right[:, columns]
            added = bias if bias is None else bias[rows, columns]
        else:
            target, first, second, added = out_MM, left, right, bias
        if added is None:
            torch.mm(first, second, out=target)
        else:
            torch.addmm(added, first, second, beta=beta, alpha=alpha, out=target)
        if begin + step < size:
            out_MM[begin + step :, rows].copy_(target[:, step:].mT)
