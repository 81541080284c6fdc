"""The GPU kernels as compiled: registers, memories, instructions and residency of every shipped configuration.

Needs Triton and no GPU. About a second a row the first time; Triton's cache keeps what was compiled. Exit status 1 if
a configuration spills registers, exceeds a limit of its target or multiplies without the matrix instructions.

Columns: regs and spill B of a thread; shared B and TMEM columns of a program; matrix instruction and how many; TMA ops
and cp.async that copy tiles; resident, the share of a multiprocessor's warps that fit at once (programs), and what
limits them; floor us, FLOPs and bytes of a 4096 x 4096 launch over published peak rates. Residency and floor are
arithmetic: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from muonlm_kernels.bench.options import writable_file
from muonlm_kernels.bench.table import table

if TYPE_CHECKING:
    from muonlm_kernels.gpu.compiled import Compiled
    from muonlm_kernels.gpu.configs import ShippedKernel

TARGETS: Final = ("sm_80", "sm_90", "sm_100", "gfx942")
_HEADER: Final = (
    *("", "threads", "regs", "spill B", "shared B", "TMEM", "matrix instruction", "TMA", "cp.async", "resident"),
    *("limit", "floor us"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `compiled`."""
    add = parser.add_argument
    add("--target", nargs="+", choices=TARGETS, default=TARGETS, metavar="T", help=f"[{' '.join(TARGETS)}]")
    add(
        "--kernel", nargs="+", metavar="K", help="only rows that start so, as `symmetric` or `update_tma 128x128` [all]"
    )
    add("--dtype", choices=("bf16", "fp16"), default="bf16", help="of the iterates [bf16]")
    add("--spilled-too", action="store_true", help="also tiles that are not shipped, and why")
    add("--json", type=writable_file, metavar="FILE", help="write all figures as JSON too")


def run(args: argparse.Namespace) -> int:
    """Compile, print, write; 0 without problems, 1 with some, 2 where nothing can be compiled."""
    refusal = why_not()
    if refusal:
        print(f"compiled: {refusal}", file=sys.stderr)
        return 2
    from muonlm_kernels.gpu import compiled, configs

    rows: list[Compiled] = []
    problems: list[str] = []
    for target in args.target:
        found, reasons = _compile(configs.shipped(target, args.dtype), target, args.kernel)
        rows += found
        problems += reasons
        print(_section(target, found) if found else "", end="")
        if args.spilled_too:
            found, reasons = _compile(compiled.rejected(target, args.dtype), target, args.kernel)
            print(_section(f"{target}, not shipped", found) if found else "", *reasons, sep="\n", end="\n\n")
    if not rows and not problems:
        print(f"compiled: no kernel starts with {' or '.join(map(repr, args.kernel))}", file=sys.stderr)
        return 2
    print("\n".join(problems) or f"{len(rows)} shipped configurations, no problem")
    if args.json:
        args.json.write_text(json.dumps({"problems": problems, "rows": [facts(row) for row in rows]}, indent=1) + "\n")
    return 1 if problems else 0


def why_not() -> str | None:
    """Why kernels cannot be compiled in this process, or None."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it"
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return "Triton is not installed (pip install triton)"
    return None


def facts(row: Compiled) -> dict[str, Any]:
    """A row with all that follows from it, for JSON."""
    residency = row.residency
    return {
        **asdict(row),
        "resident_programs": residency.programs,
        "resident_share": residency.share,
        "resident_limit": residency.limit,
        "floor_s": row.floor_s,
        "problems": row.problems,
    }


def _compile(
    kernels: Sequence[ShippedKernel], target: str, starts: Sequence[str] | None
) -> tuple[list[Compiled], list[str]]:
    """Rows of the kernels that were asked for, and what is wrong with them."""
    from muonlm_kernels.gpu.compiled import CompilationError, compile_kernel

    rows, problems = [], []
    wanted = [kernel for kernel in kernels if starts is None or kernel.label.startswith(tuple(starts))]
    print(f"{target}: {len(wanted)} kernels ...", file=sys.stderr, flush=True)
    for kernel in wanted:
        try:
            row = compile_kernel(kernel, target)
        except CompilationError as error:
            problems.append(str(error))
            continue
        rows.append(row)
        problems += [f"{row.label} for {target}: {problem}" for problem in row.problems]
    return rows, problems


def _section(title: str, rows: Sequence[Compiled]) -> str:
    return f"{title}\n\n{table(_HEADER, [_cells(row) for row in rows])}\n\n"


def _cells(row: Compiled) -> list[str]:
    residency = row.residency
    name = row.matmul.partition(".F32")[0]
    return [
        row.label,
        *map(str, (row.threads, row.registers, row.spill_bytes, row.shared_bytes, row.tensor_columns)),
        f"{name} x{row.matmuls}" if row.matmul else "-",
        *map(str, (row.tma_ops, row.async_copies)),
        f"{residency.share:.0%} ({residency.programs})",
        residency.limit,
        f"{row.floor_s * 1e6:.1f}",
    ]
