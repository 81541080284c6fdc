"""Launches of products are the very kernels that are compiled ahead of time: same types, same multiples of 16.

Triton compiles a kernel anew for arguments that are 1 or no multiples of 16. Here nothing is launched: the arguments
are looked at, as Triton would, and held against the list of what is compiled.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from muonlm_kernels.gpu import backend, configs, symmetric, tma, update

PRODUCTS = {
    "symmetric_kernel": symmetric,
    "update_kernel": update,
    "symmetric_tma_kernel": tma,
    "update_tma_kernel": tma,
}
POLAR_EXPRESS = (
    *((8.205, -22.90, 16.460), (4.066, -2.861, 0.5184), (3.909, -2.823, 0.525)),
    *((3.286, -2.416, 0.4853), (2.278, -1.620, 0.3980)),
)
CUBIC = ((100.0, -3.0, 0.0),)


class Recorder:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __init__(self, name: str, arg_names: list[str], launched: list[tuple]) -> None:
        self.__name__, self.arg_names, self.launched = name, arg_names, launched

    def __getitem__(self, grid: tuple[int, ...]):
        assert grid[0] > 0
        return self

    def __call__(self, *args: Any, num_warps: int, num_stages: int, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args)) | kwargs
        types = {name: kind_of(value) for name, value in given.items() if name not in kwargs}
        self.launched.append((self.__name__, num_warps, num_stages, frozenset({**types, **kwargs}.items())))


def kind_of(value: Any) -> str | int:
    """Triton's type of an argument, with "D" where it is a multiple of 16; a number that is 1 is a constant."""
    if isinstance(value, TensorDescriptor):
        assert value.base.data_ptr() % 16 == 0
        assert all(stride * value.base.element_size() % 16 == 0 for stride in value.strides[:-1])
        return "tensordesc<bf16[{},{},{}]>".format(*value.block_shape)
    if isinstance(value, torch.Tensor):
        assert value.dtype == torch.bfloat16
        return "*bf16 D" if value.data_ptr() % 16 == 0 else "*bf16"
    if isinstance(value, float):
        return "fp32"
    return 1 if value == 1 else "i32 D" if value % 16 == 0 else "i32"


def compiled(target: str) -> set[tuple]:
    found = set()
    for kernel in configs.shipped(target):
        types = {
            name: kernel.constexprs.get(name, kind + " D" * (name in kernel.divisible))
            for name, kind in kernel.signature.items()
        }
        found.add((kernel.fn.__name__, kernel.num_warps, kernel.num_stages, frozenset(types.items())))
    return found


@pytest.mark.parametrize("target", configs.TARGETS)
def test_every_launch_of_a_product_is_compiled_ahead_of_time(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple] = []
    for name, module in PRODUCTS.items():
        monkeypatch.setattr(module, name, Recorder(name, list(getattr(module, name).arg_names), launched))
    monkeypatch.setattr(configs, "target_of", lambda device: target)
    monkeypatch.setattr(backend._Launcher, "normalize", lambda self, grad_KMN, *_: torch.ones(len(grad_KMN)))
    for shape in [(1, 1, 1), (3, 33, 40), (1, 129, 24), (2, 16, 48), (2, 48, 16), (1, 1000, 2056), (1, 2048, 4096)]:
        for triples in (POLAR_EXPRESS, POLAR_EXPRESS[:1], CUBIC):
            for compensated in (False, True):
                for method in ("standard", "paired"):
                    grad = torch.empty(shape, dtype=torch.bfloat16)
                    backend.orthogonalize(grad, triples, dtype=torch.bfloat16, method=method, compensated=compensated)
    products = {kernel for kernel in compiled(target) if kernel[0] in PRODUCTS}
    assert set(launched) - products == set()
    shipped_tiles = [configs._SHIPPED[target][kernel] for kernel in ("symmetric", "update", "update_lo")]
    assert len(set(launched)) > 2 * len(shipped_tiles), "few of the kernels were asked for"
