"""Launch configurations of the kernels: what is shipped for each target, and which one a shape gets.

The choices are static. They rest on what the compiler reports: no spilled register, shared and tensor memory within the
target's limits, at least one program resident on each multiprocessor. Those of sm_90 were timed on an H100 besides
(`muonlm_kernels.bench gpu`); the others never were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import triton

from muonlm_kernels.gpu import elementwise, symmetric, tma, update

TARGETS: Final = ("sm_80", "sm_90", "sm_100", "gfx942")
# Interpreted programs cost by the step and not by the element, but the shapes of the tests are small.
INTERPRETER: Final = "interpreter"

# Multiprocessors (compute units) of A100, H100, B200 and MI300X: a launch with fewer programs leaves some idle.
_MULTIPROCESSORS: Final = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, INTERPRETER: 1}


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel is launched.

    kernel: "symmetric", "update", their "_tma" forms, "momentum", "stats" or "scale_cast".
    block_m, block_n: tile of the result; block_k: step along the sum, 0 where there is none.
    num_warps, num_stages: as Triton means them.
    extra: "group" (width of a super-tile or band, in tiles) of products; "max_parts" (partial norms of one matrix) of
    the memory-bound kernels.
    """

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    extra: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def constants(self) -> dict[str, int]:
        """The constant arguments of the kernel that the configuration decides."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        if self.block_k:
            return blocks | {"BLOCK_K": self.block_k, "GROUP": self.extra["group"]}
        return blocks | {"MAX_PARTS": self.extra["max_parts"]} if self.kernel == "scale_cast" else blocks

    @property
    def launch(self) -> dict[str, int]:
        """The keyword arguments of a launch that the configuration decides."""
        return self.constants | {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}" + (f"x{self.block_k}" if self.block_k else "")
        group = f" g{self.extra['group']}" if "group" in self.extra else ""
        return f"{self.kernel} {tile} w{self.num_warps} s{self.num_stages}{group}"


def _elementwise(kernel: str, tile: tuple[int, int], warps: int) -> KernelConfig:
    # 512 programs keep enough loads in flight for one large matrix, and their partial norms are 4 KB to read back.
    return KernelConfig(kernel, *tile, 0, warps, 1, {"max_parts": 512})


_ELEMENTWISE: Final = {
    "momentum": (_elementwise("momentum", (16, 256), 8),),
    "stats": (_elementwise("stats", (16, 256), 8),),
    # Square, because the transposing form is contiguous along rows on one side and along columns on the other.
    "scale_cast": (_elementwise("scale_cast", (64, 64), 4),),
}


def _products(kernel: str, *shapes: tuple[tuple[int, int, int], int, int, int]) -> tuple[KernelConfig, ...]:
    return tuple(KernelConfig(kernel, *tile, warps, stages, {"group": group}) for tile, warps, stages, group in shapes)


# Largest tile first. Super-tiles and bands hold the operands of a wave of programs in L2 for matrices that exceed it.
# "update_lo" is an update that carries a rounding: the tiles for which that does not spill.
_SHIPPED: Final[dict[str, dict[str, tuple[KernelConfig, ...]]]] = {
    "sm_80": {
        "symmetric": _products("symmetric", ((128, 128, 32), 4, 4, 8), ((64, 64, 64), 4, 3, 1)),
        "update": _products("update", ((128, 128, 32), 4, 4, 8), ((64, 64, 64), 4, 3, 8)),
        "update_lo": _products("update", ((128, 128, 64), 8, 3, 8), ((64, 64, 64), 4, 3, 8)),
        **_ELEMENTWISE,
    },
    "sm_90": {
        # As timed on an H100; a tile of 128 x 256 takes 1.1 to 1.5 times as long on every shape.
        "symmetric": _products("symmetric_tma", ((128, 128, 64), 8, 3, 1), ((64, 64, 64), 4, 3, 1)),
        "update": _products(
            "update_tma", ((128, 256, 64), 8, 4, 8), ((128, 128, 64), 8, 3, 8), ((64, 64, 64), 4, 3, 8)
        ),
        "update_lo": _products("update_tma", ((128, 128, 64), 8, 3, 8), ((64, 64, 64), 4, 3, 8)),
        **_ELEMENTWISE,
    },
    "sm_100": {
        "symmetric": _products(
            "symmetric_tma", ((128, 256, 64), 8, 4, 4), ((128, 128, 64), 8, 3, 4), ((64, 64, 64), 4, 3, 1)
        ),
        "update": _products(
            "update_tma", ((128, 256, 64), 8, 4, 8), ((128, 128, 64), 8, 3, 8), ((64, 64, 64), 4, 3, 8)
        ),
        "update_lo": _products(
            "update_tma", ((128, 256, 64), 8, 4, 8), ((128, 128, 64), 8, 3, 8), ((64, 64, 64), 4, 3, 8)
        ),
        **_ELEMENTWISE,
    },
    "gfx942": {
        "symmetric": _products("symmetric", ((128, 128, 64), 8, 2, 8), ((64, 64, 64), 4, 2, 1)),
        "update": _products("update", ((128, 128, 64), 8, 2, 8), ((64, 64, 64), 4, 2, 8)),
        "update_lo": _products("update", ((128, 128, 64), 8, 2, 8), ((64, 64, 64), 4, 2, 8)),
        **_ELEMENTWISE,
    },
    INTERPRETER: {
        "symmetric": _products("symmetric", ((32, 64, 64), 4, 1, 1)),
        "update": _products("update", ((64, 64, 64), 4, 1, 2)),
        "update_lo": _products("update", ((64, 64, 64), 4, 1, 2)),
        "momentum": (KernelConfig("momentum", 32, 64, 0, 4, 1, {"max_parts": 4}),),
        "stats": (KernelConfig("stats", 32, 64, 0, 4, 1, {"max_parts": 4}),),
        "scale_cast": (KernelConfig("scale_cast", 64, 64, 0, 4, 1, {"max_parts": 4}),),
    },
}

# Not the first choice by what the compiler reports, but near enough for a timing to decide.
_ALTERNATIVES: Final[dict[str, dict[str, tuple[KernelConfig, ...]]]] = {
    "sm_80": {
        "symmetric": _products("symmetric", ((128, 256, 32), 8, 3, 4), ((128, 128, 32), 4, 5, 8)),
        "update": _products("update", ((128, 256, 32), 8, 3, 8), ((128, 128, 32), 4, 5, 8)),
        "update_lo": _products("update", ((64, 128, 32), 4, 4, 8)),
    },
    "sm_90": {
        "symmetric": _products("symmetric_tma", ((128, 256, 64), 8, 4, 4), ((128, 128, 64), 8, 3, 4)),
        "update": _products("update_tma", ((128, 128, 64), 8, 3, 1)),
    },
    "sm_100": {
        "symmetric": _products("symmetric_tma", ((128, 128, 64), 8, 3, 1)),
        "update": _products("update_tma", ((128, 128, 64), 8, 3, 1)),
    },
    "gfx942": {
        "symmetric": _products("symmetric", ((128, 128, 32), 8, 2, 8)),
        "update": _products("update", ((128, 128, 32), 8, 2, 8)),
        "update_lo": _products("update", ((128, 128, 32), 8, 2, 8)),
    },
}


def target_of(device: torch.device) -> str:
    """The entry of the table for a device: the newest target it is not older than; the interpreter's for a CPU.

    Consumer generations (sm_86, sm_89, sm_120) take the A100's, whose shared memory they can hold. ValueError for a
    CPU without TRITON_INTERPRET=1 and for NVIDIA before Ampere, which has no bfloat16.
    """
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            raise ValueError("Triton kernels need a GPU; on a CPU use newton_schulz, or set TRITON_INTERPRET=1 to test")
        return INTERPRETER
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"{device} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer")
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def pick(target: str, kernel: str, *, batch: int, rows: int, cols: int) -> KernelConfig:
    """The shipped configuration of `kernel` ("symmetric", "update_lo", ...) for a stack (batch, rows, cols).

    The largest tile that still gives every multiprocessor a program, else the smallest. `rows` x `cols` is the result
    of "update" and of the memory-bound kernels; for "symmetric" the result is `rows` x `rows`.
    """
    choices = _SHIPPED[target][kernel]
    for config in choices:
        if tiles(config, batch=batch, rows=rows, cols=cols) >= _MULTIPROCESSORS[target]:
            return config
    return choices[-1]


def tiles(config: KernelConfig, *, batch: int, rows: int, cols: int) -> int:
    """Tiles that hold a part of the result: those of the upper triangle for a symmetric product, else all."""
    tiles_n = triton.cdiv(cols, config.block_n)
    if not config.kernel.startswith("symmetric"):
        return batch * triton.cdiv(rows, config.block_m) * tiles_n
    tiles_n = triton.cdiv(rows, config.block_n)
    return batch * tiles_n * (tiles_n + 1) // 2 * (config.block_n // config.block_m)


def candidates(target: str, kernel: str) -> tuple[KernelConfig, ...]:
    """Configurations of `kernel` worth timing: those shipped, and alternatives that fit the target as well."""
    return _SHIPPED[target][kernel] + _ALTERNATIVES.get(target, {}).get(kernel, ())


@dataclass(frozen=True)
class ShippedKernel:
    """One compiled variant: what `triton.compiler.ASTSource` needs, and the work of a reference launch.

    signature: Triton type of each argument; constexprs: values of the constant ones; divisible: arguments known to be
    multiples of 16. flops, bytes: of one launch on a matrix of `REFERENCE` rows and columns, each operand moved once.
    """

    label: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, int | bool]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    flops: float
    bytes: float


REFERENCE: Final = 4096
_FLOATS: Final = ("alpha", "beta", "gain", "weight")
_POINTERS: Final = {"partials_ptr": "*fp32", "finite_ptr": "*u8", "momentum_ptr": "*fp32", "lo_ptr": "*bf16"}


def shipped(target: str, dtype: str = "bf16") -> list[ShippedKernel]:
    """The compiled variants that launches on `target` ask for, and those of every candidate; `dtype` bf16 or fp16."""
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    return [
        variant
        for kernel in _SHIPPED[target]
        for config in candidates(target, kernel)
        for variant in variants(config, dtype, carried=kernel == "update_lo")
    ]


def variants(config: KernelConfig, dtype: str = "bf16", *, carried: bool = False) -> list[ShippedKernel]:
    """The specializations of one configuration that launches ask for; for "update" only those that carry, or not.

    Products are launched on sizes and strides that are multiples of 16, whatever the matrix (see `padding`).
    """
    n = REFERENCE
    fn: Any
    flags: dict[str, dict[str, int | bool]]
    match config.kernel:
        case "symmetric" | "symmetric_tma":
            flags = {"xxt": {"HAS_D": False}, "poly": {"HAS_D": True}}
            fn = symmetric.symmetric_kernel if config.kernel == "symmetric" else tma.symmetric_tma_kernel
            flops, moved = float(n) ** 3 + n**2, 4.0 * n**2
        case "update" | "update_tma":
            tall = {"CARRY": False, "stride_yn": n, "stride_ym": 1}
            flags = {"lo": {"CARRY": True}} if carried else {"wide": {"CARRY": False}, "tall": tall}
            fn = update.update_kernel if config.kernel == "update" else tma.update_tma_kernel
            flops, moved = 2.0 * n**3, (10.0 if carried else 6.0) * n**2
        case "momentum":
            flags = {"nesterov": {"NESTEROV": True}}
            fn, flops, moved = elementwise.momentum_kernel, 9.0 * n**2, 12.0 * n**2
        case "stats":
            flags = {"wide": {}}
            fn, flops, moved = elementwise.stats_kernel, 3.0 * n**2, 2.0 * n**2
        case _:
            flags = {"wide": {"WRITE_LO": False}, "tall_lo": {"WRITE_LO": True, "stride_xn": n, "stride_xm": 1}}
            fn, flops, moved = elementwise.scale_cast_kernel, 2.0 * n**2, 4.0 * n**2
    return [
        _shipped(f"{config} {name}", config, fn, dtype, {**config.constants, **given}, flops, moved)
        for name, given in flags.items()
    ]


def _shipped(
    label: str,
    config: KernelConfig,
    fn: Any,
    dtype: str,
    given: Mapping[str, int | bool],
    flops: float,
    moved: float,
) -> ShippedKernel:
    """Types by the names of the arguments; the last stride of every matrix is 1 unless `given` says otherwise."""
    signature: dict[str, str] = {}
    constexprs: dict[str, int | bool] = {}
    b_rows = config.block_n if config.kernel == "symmetric_tma" else config.block_m
    blocks = {
        "a_desc": (config.block_m, config.block_k),
        "b_desc": (b_rows, config.block_k),
        "x_desc": (config.block_k, config.block_n),
    }
    for name in fn.arg_names:
        unit = name.startswith("stride_") and given.get(name, 1 if name.endswith("n") else 0) == 1
        if unit or (name in given and not name.startswith("stride_")):
            signature[name] = "constexpr"
            constexprs[name] = given.get(name, 1)
        elif name in blocks:
            signature[name] = "tensordesc<{}[1,{},{}]>".format(dtype, *blocks[name])
        elif name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, f"*{dtype}")
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
    divisible = tuple(n for n, kind in signature.items() if (kind == "i32" or kind.startswith("*")) and n != "parts")
    return ShippedKernel(label, fn, signature, constexprs, divisible, config.num_warps, config.num_stages, flops, moved)
