"""`muonlm doctor`: what this machine and this installation can do, and what to install for the rest."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("doctor", help="check the installation and the machine", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if something that training needs is broken."""
    from muonlm.cli.checks import examine

    findings = examine()
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        _show(findings)
    return 1 if findings["problems"] else 0


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
    features = Table("feature", "state", "packages", show_edge=False)
    for feature in findings["features"]:
        packages = ", ".join(f"{name} {version or 'missing'}" for name, version in feature["packages"].items())
        features.add_row(feature["feature"], "ready" if feature["is_ready"] else f"{feature['install']}", packages)
    console.print()
    console.print(features)
    console.print()
    for problem in findings["problems"]:
        console.print(f"problem: {problem}", style="bold red")
    for note in findings["notes"]:
        console.print(f"note: {note}")
    if not findings["problems"]:
        console.print("Everything that training needs is here. Try: muonlm train smoke")


def _facts(findings: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, dist, disk = findings["cpu"], findings["distributed"], findings["disk"]
    devices = [f"{d['name']}, {d['memory_bytes'] / 2**30:.0f} GiB" for d in findings["cuda_devices"]]
    speeds = [f"{name} {speed:.2f}" for name, speed in findings["matmul_tflops"].items()]
    chosen = "bfloat16" if findings["bfloat16_is_fast"] else "float32"
    return [
        ("muonlm", findings["muonlm"]),
        ("python", f"{findings['python']} on {findings['platform']}"),
        *((name, version or "missing") for name, version in findings["packages"].items()),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads used"),
        ("CUDA devices", "; ".join(devices) or "none"),
        ("matrix product", f"{', '.join(speeds) or 'not measured'} TFLOP/s with one CPU thread: 'auto' takes {chosen}"),
        ("distributed", ", ".join(dist) or "not available"),
        ("disk", f"{disk['free_bytes'] / 2**30:.1f} GiB free in {disk['path']}"),
    ]
