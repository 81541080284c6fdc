"""Memory of this machine that a process can have. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def host_memory_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that processes can still get on this host; None where that cannot be found out.

    What Linux calls available (proc_meminfo(5)), elsewhere all of the machine's; or, where it is less, the limit of the
    control group that this process is in, or of one around it (cgroups(7), both versions).
    """
    found = [*_limits(root)]
    if (available := _available(root)) is not None:
        found.append(available)
    return min(found, default=None)


def _available(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _limits(root: Path) -> Iterator[int]:
    """Of the control groups around this process; in a container those outside may be out of sight."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path)
        for inside in (group, *group.parents):
            for text in _lines(top / str(inside).lstrip("/") / name):
                if text.isdigit():  # "max" where there is none
                    yield int(text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
