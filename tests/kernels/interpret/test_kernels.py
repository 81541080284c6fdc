"""Each kernel against float64 on ragged, batched, strided and NaN-poisoned cases, with every memory access checked."""

from __future__ import annotations

import pytest

from muonlm_kernels.gpu import elementwise, symmetric, tma, update


@pytest.mark.parametrize("index", range(5))
def test_symmetric_product(interpreter, kernel_checks, index: int) -> None:
    kernel_checks.check_symmetric(symmetric, interpreter, kernel_checks.SYMMETRIC_CASES[index])


@pytest.mark.parametrize("index", range(4))
def test_update(interpreter, kernel_checks, index: int) -> None:
    kernel_checks.check_update(update, interpreter, kernel_checks.UPDATE_CASES[index])


@pytest.mark.parametrize("index", range(2))
def test_products_with_descriptors(interpreter, kernel_checks, index: int) -> None:
    kernel_checks.check_symmetric(tma, interpreter, kernel_checks.TMA_SYMMETRIC_CASES[index])
    kernel_checks.check_update(tma, interpreter, kernel_checks.TMA_UPDATE_CASES[index])


def test_carried_rounding(interpreter, kernel_checks) -> None:
    kernel_checks.check_carried_rounding(update, interpreter, "update")
    kernel_checks.check_carried_rounding(tma, interpreter, "update_tma")


@pytest.mark.parametrize("index", range(4))
def test_normalization(interpreter, kernel_checks, index: int) -> None:
    kernel_checks.check_normalize(elementwise, interpreter, kernel_checks.NORMALIZE_CASES[index])


@pytest.mark.parametrize("index", range(3))
def test_momentum(interpreter, kernel_checks, index: int) -> None:
    kernel_checks.check_momentum(elementwise, interpreter, kernel_checks.MOMENTUM_CASES[index])


def test_offsets_beyond_32_bits(interpreter, kernel_checks) -> None:
    kernel_checks.check_symmetric_offsets(symmetric, interpreter)
    kernel_checks.check_update_offsets(update, interpreter)
