"""`muonlm doctor`: what this machine and this installation can do, and what to install for the rest.

Exit code: 0 if training and all installed features are usable; 1 if something that they need is
missing, of a wrong version, or broken. A feature that is not installed is no fault.

Under torchrun it only lets the ranks meet: who is there, over which interface, and does a sum
arrive; 0 if so, 2 with the reason if not.
"""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("doctor", help="check the installation and the machine", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="import all optional packages, let ranks meet, run kernels, ask clusters and daemons: a minute at most",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if something that training or an installed feature needs is broken."""
    from muonlm.cli.host import rank_count

    if rank_count() > 1:
        _meet()
        return 0

    from muonlm.cli.checks import examine

    findings = examine(args.probe)
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        _show(findings)
    return 1 if findings["problems"] else 0


def _meet() -> None:
    """Form the process group as a run does, with its self-test, whose summary rank 0 prints."""
    from muonlm.config.schema import DistConfig
    from muonlm.dist import process

    process.start(DistConfig())
    process.shutdown()


def _show(findings: dict[str, Any]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # one of the problems that there are to report
        print(json.dumps(findings, indent=2))
        return
    console = Console(highlight=False, markup=False)
    about = Table("about", "here", show_edge=False)
    for name, value in _facts(findings):
        about.add_row(name, value)
    console.print(about)
    features = Table("feature", "state", "what it needs", show_edge=False)
    for feature, word in [
        *((package, "ready") for package in findings["features"]),
        *((program, "found") for program in findings["system"]["programs"]),
    ]:
        needs = feature.get("packages") or feature["programs"]
        shown = ", ".join(f"{name} {found or 'missing'}" for name, found in needs.items())
        features.add_row(feature["feature"], word if feature["is_ready"] else feature["install"], shown)
    console.print()
    console.print(features)
    console.print()
    if findings["probed"]:
        console.print(f"probed: {'; '.join(findings['probed'])}")
    for problem in findings["problems"]:
        console.print(f"problem: {problem}", style="bold red")
    for note in findings["notes"]:
        console.print(f"note: {note}")
    if not findings["problems"]:
        console.print("Everything that training needs is here. Try: muonlm train smoke")


def _gib(size_bytes: int | None, without: str) -> str:
    return without if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB"


def _facts(findings: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, dist, disk = findings["cpu"], findings["distributed"], findings["disk"]
    system = findings["system"]
    memory, files, quota = system["memory"], system["open_files"], system["cpu_quota"]
    devices = [
        f"{d['name']}, {_gib(d['memory_bytes'], '?')}, capability {d['capability']}" for d in findings["cuda_devices"]
    ]
    allowed = "" if quota is None else f", {quota:g} of them allowed"
    speeds = [f"{name} {speed:.2f}" for name, speed in findings["matmul_tflops"].items()]
    chosen = "bfloat16" if findings["bfloat16_is_fast"] else "float32"
    return [
        ("muonlm", findings["muonlm"]),
        ("python", f"{findings['python']} on {findings['platform']}"),
        *((name, version or "missing") for name, version in findings["packages"].items()),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores{allowed}, {cpu['threads']} used by torch"),
        (
            "memory",
            f"{_gib(memory['total_bytes'], 'unknown')}, {_gib(memory['available_bytes'], 'unknown')} available, "
            f"limit {_gib(memory['limit_bytes'], 'none')}, shared {_gib(system['shared_memory_bytes'], 'none')}",
        ),
        ("CUDA", f"{findings['cuda'] or 'not in this torch'}; NCCL {findings['nccl'] or 'not used'}"),
        ("CUDA devices", "; ".join(devices) or "none"),
        ("matrix product", f"{', '.join(speeds) or 'not measured'} TFLOP/s with one CPU thread: 'auto' takes {chosen}"),
        ("distributed", ", ".join(dist) or "not available"),
        ("network", f"{system['host']}: {', '.join(system['interfaces'])}; gloo is at {findings['rank_address']}"),
        ("limits", f"open files {files or 'any'}, locked memory {_mib(system['locked_memory_bytes'])}"),
        ("disk", f"{disk['free_bytes'] / 2**30:.1f} GiB free in {disk['path']}"),
    ]


def _mib(size_bytes: int | None) -> str:
    return "any" if size_bytes is None else f"{size_bytes / 2**20:.0f} MiB"
