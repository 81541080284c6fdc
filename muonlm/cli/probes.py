"""Checks of `muonlm doctor --probe` that take seconds each and could end the process: each runs in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import NamedTuple

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


# What makes a program talk to what it stands for: a cluster, a daemon.
_ASKED = {
    "sbatch": ("sinfo", "--noheader"),
    "kubectl": ("kubectl", "version", "--request-timeout=5s"),
    "docker": ("docker", "info"),
    "podman": ("podman", "info"),
    "buildah": ("buildah", "info"),
}


class Probed(NamedTuple):
    """What worked, what does not that training or an installed feature needs, and what else does not."""

    worked: list[str]
    problems: list[str]
    notes: list[str]


def probe(
    installed: Sequence[str], cuda_devices: int, programs: Sequence[str] = (), timeout_s: float = 180.0
) -> Probed:
    """Import the installed optional packages, let ranks meet, run a kernel, and ask `programs` for what they stand for.

    Each rank gets a GPU if there are several, else two ranks run on CPUs.
    """
    worked, problems, notes = Probed([], [], [])
    for name in installed:
        module, title = _MODULES.get(name, name), f"{name} {metadata.version(name)}"
        if said := failure([sys.executable, "-c", f"import {module}"], timeout_s):
            problems.append(f"{title} cannot be imported: {said}; try: pip install --force-reinstall {name}")
        else:
            worked.append(f"{title} imported")
    for program in programs:
        if program not in _ASKED:
            continue
        command = _ASKED[program]
        if said := failure(command, min(timeout_s, 10.0)):
            notes.append(f"{program} is here, but `{' '.join(command)}` fails: {said}")
        else:
            worked.append(f"{program} answered")
    ranks = cuda_devices if cuda_devices > 1 else 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    # With fewer GPUs than ranks these compute on CPUs.
    hidden = {} if cuda_devices > 1 else {"CUDA_VISIBLE_DEVICES": ""}
    if said := failure([*torchrun, f"--nproc-per-node={ranks}", "-m", "muonlm", "doctor"], timeout_s, hidden):
        problems.append(f"{ranks} ranks on this machine do not work together: {said}")
    else:
        worked.append(f"{ranks} ranks met, and a sum came out right")
    if cuda_devices:
        if said := failure([sys.executable, "-c", _KERNELS.format(device="cuda")], timeout_s):
            problems.append(f"Newton-Schulz on the GPU fails: {said}")
        else:
            worked.append("Newton-Schulz on the GPU agrees with the CPU")
    return Probed(worked, problems, notes)


def failure(command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> str | None:
    """What `command` said last before it failed, None if it did not."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        process = subprocess.Popen(
            command,
            env={**clean, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return str(error)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        process.communicate()
        return f"no answer within {timeout_s:.0f} s"
    if process.returncode == 0:
        return None
    lines = [line for line in (err or out).splitlines() if line.strip()]
    return _telling(lines) or f"exit code {process.returncode}"


def _telling(lines: Sequence[str]) -> str:
    """The message of muonlm if there is one, which torchrun's own report follows; else the last line."""
    for number, line in enumerate(lines):
        if line.startswith("muonlm ") and ": error" in line:
            return " ".join(lines[number : number + 2])
    return lines[-1] if lines else ""
