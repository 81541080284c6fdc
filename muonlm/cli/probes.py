"""Checks of `muonlm doctor --probe` that take seconds each and could end the process: each runs in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

_MODULES = {"lm-eval": "lm_eval"}

# The iteration on the GPU against that on the CPU, by the norm of the difference: bfloat16 makes it 0.06 (measured on a
# CPU), a result that is nothing would make it 1.
_KERNELS = """
import torch
from muonlm_kernels import newton_schulz
gradient = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
expected = newton_schulz(gradient, dtype=torch.float32).float()
found = newton_schulz(gradient.to({device!r}), dtype=torch.bfloat16).float().cpu()
difference = ((found - expected).norm() / expected.norm()).item()
assert difference < 0.2, f"its result differs by {{difference:.2g}} of its norm from that of the CPU"
"""


def probe(installed: Sequence[str], cuda_devices: int, timeout_s: float = 180.0) -> list[str]:
    """Problems found by importing the installed optional packages, letting ranks meet, and running a kernel.

    Each rank gets a GPU if there are several, else two ranks run on CPUs.
    """
    problems = []
    for name in installed:
        module = _MODULES.get(name, name)
        if said := failure([sys.executable, "-c", f"import {module}"], timeout_s):
            version = metadata.version(name)
            problems.append(f"{name} {version} cannot be imported: {said}; try: pip install --force-reinstall {name}")
    ranks = cuda_devices if cuda_devices > 1 else 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    # With fewer GPUs than ranks these compute on CPUs.
    hidden = {} if cuda_devices > 1 else {"CUDA_VISIBLE_DEVICES": ""}
    if said := failure([*torchrun, f"--nproc-per-node={ranks}", "-m", "muonlm", "doctor"], timeout_s, hidden):
        problems.append(f"{ranks} ranks on this machine do not work together: {said}")
    if cuda_devices and (said := failure([sys.executable, "-c", _KERNELS.format(device="cuda")], timeout_s)):
        problems.append(f"Newton-Schulz on the GPU fails: {said}")
    return problems


def failure(command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> str | None:
    """What `command` said last before it failed, None if it did not."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        done = subprocess.run(
            command,
            env={**clean, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return _telling(lines) or f"exit code {done.returncode}"


def _telling(lines: Sequence[str]) -> str:
    """The message of muonlm if there is one, which torchrun's own report follows; else the last line."""
    for number, line in enumerate(lines):
        if line.startswith("muonlm ") and ": error" in line:
            return " ".join(lines[number : number + 2])
    return lines[-1] if lines else ""
