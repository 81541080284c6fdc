"""Check and tune the kernels on the GPU that is there; write one file to send back or to take settings from.

Needs a CUDA or ROCm GPU that nothing else uses, with 8 GB free, and Triton. Values come first: every kernel in every
configuration against float64, and nothing is timed if one is wrong. Then each kernel in each configuration against what
torch does in its place; then whole iterations, with the peers that are installed. Expect 10 to 20 minutes, most of them
compilation (1 to 8 s for each variant of a kernel), and about 3 with --quick.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch

from muonlm_kernels import coefficients
from muonlm_kernels.bench.compare import text_of
from muonlm_kernels.bench.gpu_cases import Size
from muonlm_kernels.bench.gpu_tune import Rig, check_kernels, check_methods, tune
from muonlm_kernels.bench.measure import Plan, compare, dtype_name
from muonlm_kernels.bench.options import shape_of, writable_file
from muonlm_kernels.bench.peers import STEPS, Contender, contenders
from muonlm_kernels.bench.table import table
from muonlm_kernels.bench.timing import gpu_facts, gpu_timer, machine

if TYPE_CHECKING:
    from muonlm_kernels.gpu.configs import KernelConfig

SCHEMA = "muonlm-gpu-report/1"

_SEND = "Please attach the file to an issue: it holds figures, versions and the names of the processor and the GPU."
_FAILED = "It holds what failed. Please attach it to an issue; a traceback in it shows paths of this machine."
_USE = (
    "`chosen` in it has the fastest configuration of each kernel and size: they belong into the table for this target "
    "in muonlm_kernels/gpu/configs.py."
)


@dataclass(frozen=True)
class Extent:
    """How much is run. Ragged sizes find wrong masks and padding; `tuned` is from part of a GPU's width far beyond."""

    checked: Sequence[Size] = ((1, 33, 40), (3, 130, 1032), (2, 384, 640))
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16)
    tuned: Sequence[Size] = (
        *((1, 1024, 1024), (1, 1024, 4096), (1, 2048, 2048), (1, 2048, 8192), (1, 4096, 4096)),
        *((1, 4096, 16384), (1, 8192, 8192), (16, 1024, 4096), (96, 768, 768)),
    )
    iterated: Sequence[str] = (
        *("1024x1024", "1024x4096", "2048x2048", "2048x8192", "4096x4096", "4096x16384"),
        *("16x1024x4096", "96x768x768", "200x64x256"),
    )
    rounds: int = 9


QUICK = Extent(
    checked=((1, 33, 40), (2, 130, 264)),
    dtypes=(torch.bfloat16,),
    tuned=((1, 2048, 2048), (16, 1024, 1024)),
    iterated=("2048x2048", "16x1024x1024"),
    rounds=5,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `gpu`."""
    add = parser.add_argument
    add("--out", type=writable_file, default="muonlm-gpu-report.json", metavar="FILE", help="[%(default)s]")
    add("--quick", action="store_true", help="few sizes, bfloat16 only")


def run(args: argparse.Namespace) -> int:
    """0 with a report, 1 with a report of wrong values or of a failure, 2 without a GPU that can be used."""
    try:
        rig = rig_here()
    except ValueError as error:
        print(f"gpu report: {error}", file=sys.stderr)
        return 2
    return write_report(rig, QUICK if args.quick else Extent(), args.out)


def rig_here() -> Rig:
    """The rig of the current GPU. ValueError where there is none, it is too old, or Triton is not installed."""
    if not torch.cuda.is_available():
        raise ValueError("no GPU that this torch can use; run it on a machine with a CUDA or ROCm GPU")
    try:
        from muonlm_kernels.gpu import configs
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed (pip install {error.name})") from error
    device = torch.device("cuda", torch.cuda.current_device())
    target = configs.target_of(device)
    found, missing = contenders(device)
    return Rig(
        device=device,
        target=target,
        kernels=launches(),
        candidates=lambda kernel, size: configs.candidates(target, kernel),
        pick=lambda kernel, size: configs.pick(target, kernel, batch=size[0], rows=size[1], cols=size[2]),
        methods=methods(),
        contenders=found,
        missing=missing,
        timer=gpu_timer(device),
    )


def launches() -> SimpleNamespace:
    """The launches of the kernels by the names that the cases know; a product takes the form of its configuration."""
    from muonlm_kernels.gpu import elementwise, symmetric, tma, update

    def either(plain: Callable[..., torch.Tensor], tma: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def launch(
            left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, config: KernelConfig, **options: Any
        ) -> torch.Tensor:
            return (tma if config.kernel.endswith("_tma") else plain)(left, right, out, config, **options)

        return launch

    return SimpleNamespace(
        symmetric=either(symmetric.symmetric, tma.symmetric_tma),
        update=either(update.update, tma.update_tma),
        momentum=elementwise.momentum,
        stats=elementwise.stats,
        scale_cast=elementwise.scale_cast,
    )


def methods() -> list[Contender]:
    """The iterations that the GPU backend has, with the coefficients that peers have."""
    from muonlm_kernels.gpu import backend

    def method(name: Literal["standard", "paired", "gram"], dtype: torch.dtype, compensated: bool = False) -> Contender:
        def orthogonalize(grad: torch.Tensor) -> torch.Tensor:
            stack_KMN = grad if grad.ndim == 3 else grad.unsqueeze(0)
            triples = coefficients("jordan", STEPS)
            result, _ = backend.orthogonalize(stack_KMN, triples, dtype=dtype, method=name, compensated=compensated)
            return result if grad.ndim == 3 else result[0]

        words = ["muonlm", name, dtype_name(dtype), *(["compensated"] if compensated else [])]
        return Contender(" ".join(words), "jordan", dtype, orthogonalize, ours=True)

    return [
        method("standard", torch.bfloat16),
        method("standard", torch.bfloat16, compensated=True),
        method("paired", torch.bfloat16),
        method("standard", torch.float16),
        method("paired", torch.float16),
        method("gram", torch.float16),
    ]


def write_report(rig: Rig, extent: Extent, out: Path) -> int:
    """Measure and write `out`, which is written whatever happens; returns the exit code."""
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": {"target": rig.target, **machine(rig.device), **gpu_facts()},
        "failure": None,
        "values": [],
        "tuning": [],
        "chosen": {},
        "iterations": None,
    }
    try:
        measure(report, rig, extent)
    except Exception:  # whatever a driver or a compiler does: the report is how it becomes known
        report["failure"] = traceback.format_exc()
    lines = summary_of(report).splitlines()
    out.write_text(json.dumps({"summary": lines, **report}, indent=1) + "\n")
    print("\n".join(lines))
    print(f"\nWritten to {out}. {_FAILED if report['failure'] else f'{_USE} {_SEND}'}")
    return 1 if report["failure"] else 0


def measure(report: dict[str, Any], rig: Rig, extent: Extent) -> None:
    """Fill `report` part by part; stops with `failure` set after values that are wrong."""
    for size in extent.checked:
        for dtype in extent.dtypes:
            _progress(f"values of {size}, {dtype_name(dtype)}")
            report["values"] += check_kernels(rig, size, dtype)
        report["values"] += check_methods(rig, size)
    report["failure"] = _failure(report["values"])
    if report["failure"]:
        return
    for size in extent.tuned:
        _progress(f"configurations on {size}")
        report["tuning"] += tune(rig, size, extent.dtypes[0], rounds=extent.rounds)
    for row in report["tuning"]:
        choice = {"operation": row["operation"], "size": row["size"], "config": row.get("best_config")}
        report["chosen"].setdefault(row["kernel"], []).append(choice)
    plan = Plan(rounds=extent.rounds, budget_s=60.0, longest_call_s=5.0)
    shapes = [shape_of(text) for text in extent.iterated]
    found = [*rig.methods, *rig.contenders]
    report["iterations"] = compare(shapes, found, rig.missing, plan=plan, device=rig.device, timer=rig.timer)


def _failure(values: list[dict[str, Any]]) -> str | None:
    """What must be mended before times mean anything: wrong values, or a kernel that no configuration can launch."""
    wrong = [row for row in values if row["state"] == "wrong"]
    if wrong:
        return f"{len(wrong)} of {len(values)} results are wrong"
    launched = {(row["operation"], row["dtype"]) for row in values if row["state"] == "ok"}
    never = sorted({(row["operation"], row["dtype"]) for row in values} - launched)
    return f"no configuration can be launched of: {', '.join(map(' '.join, never))}" if never else None


def summary_of(report: dict[str, Any]) -> str:
    """The report in Markdown: what was measured on, values, each kernel against torch, whole iterations."""
    facts, values = report["machine"], report["values"]
    parts = [
        f"# muonlm kernels on {facts.get('gpu', facts['device'])}",
        "",
        *(f"- {key}: {value}" for key, value in facts.items() if value is not None),
    ]
    if report["failure"]:
        parts += ["", f"**{report['failure'].strip()}**"]
    bad = [row for row in values if row["state"] != "ok"]
    parts += ["", f"## Values: {len(values) - len(bad)} of {len(values)} results within their limits of float64"]
    header = ["operation", "size", "dtype", "configuration", "error / limit", "state"]
    cells = ("operation", "size", "dtype", "config", "error_over_limit", "state")
    parts += [table(header, [[str(row[cell]) for cell in cells] for row in bad])] if bad else []
    if report["tuning"]:
        header = ["operation", "size", "torch ms", "picked / torch", "best / torch", "best configuration", "rate"]
        parts += ["", "## Kernels: time relative to torch's own, below 1 is faster", ""]
        parts += [table(header, [_tuned_cells(row) for row in report["tuning"]])]
    if report["iterations"]:
        parts += ["", "## Whole iterations", "", text_of(report["iterations"])]
    return "\n".join(parts)


def _tuned_cells(row: dict[str, Any]) -> list[str]:
    base = [row["operation"], "x".join(map(str, row["size"])), f"{row['seconds']['torch'] * 1e3:.4g}"]
    if row["best"] is None:
        return [*base, "-", "-", "none can be launched", "-"]
    seconds = row["seconds"][row["best"]]
    picked = row["seconds"].get(row["picked"])
    rate = f"{row['dense_flops'] / seconds / 1e12:.0f} TFLOP/s" if row["dense_flops"] else ""
    ratio = row["time_ratio_to_torch"]
    return [
        *base,
        "-" if picked is None else f"{picked / row['seconds']['torch']:.2f}",
        "{:.2f} [{:.2f}, {:.2f}]".format(ratio["median"], *ratio["interval"]),
        row["best"],
        rate or f"{row['bytes'] / seconds / 1e9:.0f} GB/s",
    ]


def _progress(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)
