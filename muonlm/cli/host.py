"""What the operating system gives this process: memory, processors, limits, network, programs. Imports no torch.

Inside a container these are the container's limits, which torch does not look at. `root` is where the file system
begins, for tests.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path("/")

PROGRAMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "compiler": ("loop.compile, and Triton's first kernel on a GPU", ("g++", "gcc"), "apt-get install g++ python3-dev"),
    "slurm": ("muonlm submit --to slurm", ("sbatch",), "apt-get install slurm-client, or use a login node"),
    "kubernetes": ("muonlm submit --to k8s", ("kubectl",), "see the documentation of your cluster"),
    "containers": ("building and running the image", ("docker", "podman", "buildah"), "apt-get install buildah"),
}
"""Feature -> what it is for, programs of which the first that is found is taken, and how Debian and Ubuntu get one."""

MIN_SHARED_BYTES = 1 << 30
MIN_OPEN_FILES = 1024
_UNLIMITED_BYTES = 1 << 60  # cgroups of version 1 write a huge number where there is no limit


def examine_host(root: Path = ROOT) -> dict[str, Any]:
    """Memory, processors, limits, network and programs; sizes in bytes, None for what is unlimited or unknown."""
    return {
        "memory": {**_memory(root), "limit_bytes": memory_limit(root)},
        "cpu_quota": cpu_quota(root),
        "shared_memory_bytes": _size(root / "dev" / "shm"),
        "open_files": _limit(resource.RLIMIT_NOFILE),
        "locked_memory_bytes": _limit(resource.RLIMIT_MEMLOCK),
        "infiniband": sorted(path.name for path in root.glob("sys/class/infiniband/*")),
        "host": socket.gethostname(),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "programs": [_program(name) for name in PROGRAMS],
    }


def host_notes(host: Mapping[str, Any], threads: int) -> list[str]:
    """What of these findings will be in the way of a run, with what to do. `threads` is how many torch would use."""
    notes = []
    shared, files, locked, quota = (
        host[key] for key in ("shared_memory_bytes", "open_files", "locked_memory_bytes", "cpu_quota")
    )
    if shared is not None and shared < MIN_SHARED_BYTES:
        notes.append(
            f"/dev/shm has only {shared / 2**20:.0f} MiB, and NCCL moves data between GPUs of one machine through it: "
            "docker run --shm-size=16g, or --ipc=host"
        )
    if files is not None and files < MIN_OPEN_FILES:
        notes.append(f"only {files} files may be open, and each rank opens sockets to others: ulimit -n 65536")
    if host["infiniband"] and locked is not None:
        notes.append(
            f"InfiniBand needs memory that stays in place, and only {locked / 2**20:.0f} MiB may be locked: "
            "ulimit -l unlimited, or docker run --ulimit memlock=-1"
        )
    if quota is not None and threads > max(1, quota):
        notes.append(
            f"this process may use {quota:g} processors, and torch would start {threads} threads: "
            f"export OMP_NUM_THREADS={max(1, int(quota))}"
        )
    return notes


def memory_limit(root: Path = ROOT) -> int | None:
    """The least memory limit of this process's control groups in bytes, None if there is none."""
    limits = []
    for folder, version in _control_groups(root, "memory"):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        text = _read(folder / name)
        if text.isdigit() and int(text) < _UNLIMITED_BYTES:
            limits.append(int(text))
    return min(limits, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors that this process's control groups allow, a fraction perhaps; None if all."""
    quotas = []
    for folder, version in _control_groups(root, "cpu"):
        if version == 2:
            words = _read(folder / "cpu.max").split()
        else:
            words = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _control_groups(root: Path, controller: str) -> list[tuple[Path, int]]:
    """Folders of the groups of this process, up to the top, each with the version of cgroups; see cgroups(7)."""
    found = []
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        top = root / "sys" / "fs" / "cgroup" / ("" if version == 2 else controller)
        group = top / path.strip("/")
        found += [(folder, version) for folder in (group, *group.parents) if folder == top or top in folder.parents]
    return found


def _memory(root: Path) -> dict[str, int | None]:
    lines = dict(line.split(":", 1) for line in _read(root / "proc" / "meminfo").splitlines() if ":" in line)
    names = {"total_bytes": "MemTotal", "available_bytes": "MemAvailable"}
    return {key: int(lines[name].split()[0]) * 1024 if name in lines else None for key, name in names.items()}


def _program(feature: str) -> dict[str, Any]:
    purpose, names, install = PROGRAMS[feature]
    found = next((path for name in names if (path := shutil.which(name))), None)
    programs = {Path(found).name: found} if found else dict.fromkeys(names)
    return {"feature": purpose, "is_ready": found is not None, "programs": programs, "install": install}


def _limit(number: int) -> int | None:
    soft = resource.getrlimit(number)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _size(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def is_loopback(address: str) -> bool:
    """Whether other machines cannot reach an IP address."""
    return address.startswith("127.") or address == "::1"


def routed_interfaces(root: Path = ROOT) -> list[str]:
    """Interfaces by which other machines may be reached: those with a route, but not those of container engines."""
    lines = _read(root / "proc" / "net" / "route").splitlines()[1:]
    names = dict.fromkeys(line.split()[0] for line in lines)
    return [name for name in names if not name.startswith(("lo", "docker", "veth", "br-", "cni", "virbr"))]


def rank_count() -> int:
    """WORLD_SIZE as torchrun sets it, 1 without torchrun."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1
