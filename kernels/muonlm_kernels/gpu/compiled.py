"""What the compiler makes of a kernel on a target: registers, spills, memories, instructions. Needs no GPU.

`compile_kernel` runs Triton's compiler for a named target and reads the binary that a launch would load, by the tools
that Triton brings. Nothing is run and nothing is timed: residency follows from the resources, and `floor_s` divides
published peak rates into the work of a reference launch.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from muonlm_kernels.gpu.configs import KernelConfig, ShippedKernel, variants

_TOOLS: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Four partitions of a multiprocessor or compute unit each have 512 registers a lane, which warps get in units of 8.
_PARTITIONS: Final = 4
_REGISTERS: Final = 512
_REGISTER_UNIT: Final = 8
_PROGRAMS: Final = 32


@dataclass(frozen=True)
class Target:
    """What one multiprocessor (compute unit) offers, and the published peak rates of the whole device.

    shared_bytes: most that one program may ask for; resident_shared_bytes: for all programs together, of which each
    costs `reserved_shared_bytes` more than it asks for. tensor_columns: of tensor memory. warps: most that are resident
    on one of the four partitions. matmul: start of the name of its matrix instruction. flops_per_s: dense, bf16.
    """

    device: str
    gpu: GPUTarget
    shared_bytes: int
    resident_shared_bytes: int
    reserved_shared_bytes: int
    tensor_columns: int
    warps: int
    matmul: str
    flops_per_s: float
    bytes_per_s: float


# CUDA programming guide, technical specifications by compute capability; AMD CDNA 3 ISA; rates from the data sheets.
TARGETS: Final = {
    "sm_80": Target("A100", GPUTarget("cuda", 80, 32), 166912, 167936, 1024, 0, 16, "HMMA", 312e12, 2.04e12),
    "sm_90": Target("H100", GPUTarget("cuda", 90, 32), 232448, 233472, 1024, 0, 16, "HGMMA", 989e12, 3.35e12),
    "sm_100": Target("B200", GPUTarget("cuda", 100, 32), 232448, 233472, 1024, 512, 16, "UTCHMMA", 2250e12, 8.0e12),
    "gfx942": Target("MI300X", GPUTarget("hip", "gfx942", 64), 65536, 65536, 0, 0, 8, "v_mfma", 1307e12, 5.3e12),
}

# Tiles next to those shipped: too many registers, or too much shared memory. The figures are what speaks against them.
_REJECTED: Final[dict[str, tuple[KernelConfig, ...]]] = {
    "sm_80": (
        KernelConfig("symmetric", 128, 128, 64, 4, 3, {"group": 8}),
        KernelConfig("symmetric", 256, 256, 64, 8, 3, {"group": 8}),
        KernelConfig("update", 256, 256, 64, 8, 3, {"group": 8}),
    ),
    "sm_90": (
        KernelConfig("symmetric_tma", 256, 256, 64, 8, 3, {"group": 4}),
        KernelConfig("update_tma", 128, 256, 128, 8, 3, {"group": 8}),
        KernelConfig("update_tma", 256, 256, 64, 8, 3, {"group": 8}),
    ),
    "sm_100": (
        KernelConfig("symmetric_tma", 256, 256, 64, 8, 3, {"group": 4}),
        KernelConfig("update_tma", 256, 256, 64, 8, 3, {"group": 8}),
    ),
    "gfx942": (
        KernelConfig("symmetric", 256, 256, 64, 8, 2, {"group": 8}),
        KernelConfig("update", 128, 256, 64, 8, 3, {"group": 8}),
    ),
}


class CompilationError(Exception):
    """A kernel that does not compile; the message names the kernel, the target and the compiler's first error."""


@dataclass(frozen=True)
class Residency:
    """How many programs a multiprocessor can hold, the share of its warps they are, and the resource that ends first.

    limit: "registers", "shared memory", "tensor memory" or "warps". An upper bound on what hides latency, not a speed.
    """

    programs: int
    share: float
    limit: str


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one target.

    registers: of a thread, on AMD architectural and accumulation ones together. spill_bytes: local memory of a thread,
    where registers go that do not fit; shared_bytes, tensor_columns: of a program. multiplies: whether the source has a
    matrix product; matmul: the most frequent matrix instruction ("" if none) and matmuls, how many of all of them there
    are. tma_ops, async_copies: instructions that copy tiles by descriptor, and by cp.async. flops, bytes: of the
    reference launch.
    """

    label: str
    target: str
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    multiplies: bool
    matmul: str
    matmuls: int
    tma_ops: int
    async_copies: int
    flops: float
    bytes: float

    @property
    def residency(self) -> Residency:
        """Programs that fit into one multiprocessor at the same time."""
        target = TARGETS[self.target]
        warps = self.threads // target.gpu.warp_size
        register_warps = _PARTITIONS * (_REGISTERS // _round_up(max(self.registers, 1), _REGISTER_UNIT))
        shared = _round_up(self.shared_bytes, 128) + target.reserved_shared_bytes
        programs = {
            "warps": min(_PARTITIONS * target.warps // warps, _PROGRAMS),
            "registers": register_warps // warps,
            "shared memory": target.resident_shared_bytes // shared if shared else _PROGRAMS,
            "tensor memory": target.tensor_columns // self.tensor_columns if self.tensor_columns else _PROGRAMS,
        }
        limit = min(programs, key=programs.__getitem__)
        return Residency(programs[limit], programs[limit] * warps / (_PARTITIONS * target.warps), limit)

    @property
    def floor_s(self) -> float:
        """Least time of the reference launch at the published peak rates: arithmetic, not a measurement."""
        target = TARGETS[self.target]
        return max(self.flops / target.flops_per_s, self.bytes / target.bytes_per_s)

    @property
    def problems(self) -> list[str]:
        """Why this should not be shipped; empty if nothing speaks against it."""
        target = TARGETS[self.target]
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} B of registers a thread")
        if self.shared_bytes > target.shared_bytes:
            found.append(f"{self.shared_bytes} B of shared memory, {target.device} has {target.shared_bytes}")
        if self.tensor_columns > target.tensor_columns:
            found.append(f"{self.tensor_columns} columns of tensor memory, {target.device} has {target.tensor_columns}")
        if self.residency.limit in ("registers", "warps") and not self.residency.programs:
            found.append(f"{self.threads} threads of {self.registers} registers do not fit into a multiprocessor")
        if self.multiplies and not self.matmul.startswith(target.matmul):
            found.append(f"multiplies by {self.matmul or 'scalar instructions'} instead of {target.matmul}")
        return found


def rejected(target: str, dtype: str = "bf16") -> list[ShippedKernel]:
    """Kernels of tiles that were tried and are not shipped; of each, a variant has `problems`."""
    return [kernel for config in _REJECTED[target] for kernel in variants(config, dtype, carried=False)]


def compile_kernel(kernel: ShippedKernel, target: str) -> Compiled:
    """Compile for "sm_80", "sm_90", "sm_100" or "gfx942" (0.2 to 3 s; from Triton's cache 0.3 s).

    Raises ValueError for another target and where TRITON_INTERPRET=1 has replaced the compiler, and CompilationError.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    gpu = TARGETS[target].gpu
    source = ASTSource(
        fn=kernel.fn,
        signature=kernel.signature,
        constexprs={(kernel.fn.arg_names.index(name),): value for name, value in kernel.constexprs.items()},
        attrs={(kernel.fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in kernel.divisible},
    )
    with _stderr_in_file() as stderr:
        try:
            options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
            binary = triton.compile(source, target=gpu, options=options)
        except Exception as error:  # passes, LLVM and ptxas raise each their own
            raise CompilationError(f"{kernel.label} for {target}: {_first_error(stderr, error)}") from error
    return Compiled(
        label=kernel.label,
        target=target,
        shared_bytes=binary.metadata.shared,
        multiplies="tt.dot" in binary.asm["ttir"],
        flops=kernel.flops,
        bytes=kernel.bytes,
        **(_read_nvidia(binary) if gpu.backend == "cuda" else _read_amd(binary.asm["amdgcn"])),
    )


def _read_nvidia(binary: Any) -> dict[str, Any]:
    """The cubin's own figures, and the machine instructions counted by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    names = sass_instructions(assembly)
    return {
        "threads": math.prod(
            int(size) for size in re.findall(r"\d+", _only(r"\.reqntid ([\d, ]+)", binary.asm["ptx"]))
        ),
        "registers": int(_only(r"REG:(\d+)", usage)),
        "spill_bytes": int(_only(r"STACK:(\d+)", usage)) + int(_only(r"LOCAL:(\d+)", usage)),
        "tensor_columns": binary.metadata.tmem_size or 0,
        "tma_ops": _count(names, "UTMALDG", "UTMASTG", "UTMAREDG"),
        "async_copies": _count(names, "LDGSTS"),
        **_matmuls(names, "HMMA", "HGMMA", "UTCHMMA"),
    }


def sass_instructions(assembly: str) -> Counter[str]:
    """How often each instruction is in what nvdisasm prints: `/*0120*/  @!P0 LDGSTS.E.128 [R1+0x20], ... ;`."""
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", assembly))


def _read_amd(assembly: str) -> dict[str, Any]:
    """The metadata that the assembler puts into the code object, and the machine instructions counted by name."""
    names = Counter(re.findall(r"^\s+([a-z]\w+)", assembly, re.MULTILINE))
    return {
        "threads": int(_only(r"\.max_flat_workgroup_size: *(\d+)", assembly)),
        "registers": int(_only(r"\.vgpr_count: *(\d+)", assembly)),
        "spill_bytes": int(_only(r"\.private_segment_fixed_size: *(\d+)", assembly)),
        "tensor_columns": 0,
        "tma_ops": 0,
        "async_copies": 0,
        **_matmuls(names, "v_mfma"),
    }


def _matmuls(names: Counter[str], *starts: str) -> dict[str, Any]:
    found = Counter({name: count for name, count in names.items() if name.startswith(starts)})
    return {"matmul": max(found, key=found.__getitem__, default=""), "matmuls": found.total()}


def _count(names: Counter[str], *starts: str) -> int:
    return sum(count for name, count in names.items() if name.startswith(starts))


def _only(pattern: str, text: str) -> str:
    """What the group of `pattern` holds; the texts are of one kernel, so it is there exactly once."""
    (found,) = re.findall(pattern, text)
    return str(found)


def _tool(name: str, *args: str) -> str:
    """Output of a program that Triton brings: a CUDA toolkit of the machine may be too old for the newest target."""
    return subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@contextlib.contextmanager
def _stderr_in_file() -> Iterator[BinaryIO]:
    """Keeps off the terminal the module of megabytes that a failing pass writes to descriptor 2, from C++.

    A failing ptxas has its input printed by Python.
    """
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(io.StringIO()):
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _first_error(stderr: BinaryIO, error: Exception) -> str:
    stderr.seek(0)
    written = stderr.read().decode(errors="replace")
    found = re.search(r"error: (.*)", written)
    return found[1] if found else f"{type(error).__name__}: {error}".strip().splitlines()[0]
