#!/usr/bin/env python3
"""Is a run of this container stuck? Exit code 1 if one that says "running" has recorded nothing for too long.

Reads status.json and metrics.jsonl below the working directory, quickly; imports neither torch nor muonlm.
MUONLM_STALL_S, 1800 if not set, is how long a run may be silent: longer than track.interval_steps of its steps, its
evaluations and its checkpoints take.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

PATTERNS = ("runs/*/status.json", "runs/*/runs/*/status.json")
"""Runs, and the runs of comparisons."""


def stalled(directory: Path, since: float, limit_s: float, now: float) -> list[str]:
    """Runs that something wrote to after `since` and that are silent for more than `limit_s` seconds at `now`.

    What is older than `since` belongs to another container, or to a run that was killed.
    """
    found = []
    for status in sorted(path for pattern in PATTERNS for path in directory.glob(pattern)):
        try:
            files = [path for path in (status, status.with_name("metrics.jsonl")) if path.exists()]
            latest = max(path.stat().st_mtime for path in files)
            is_running = json.loads(status.read_text(encoding="utf-8"))["state"] == "running"
        except (OSError, ValueError, KeyError):  # being replaced just now, or not ours
            continue
        if is_running and latest >= since and now - latest > limit_s:
            found.append(f"{status.parent}: nothing recorded for {now - latest:.0f} s")
    return found


def container_start() -> float:
    """When the container's first process began, in seconds since the epoch."""
    now, uptime_s = time.time(), float(Path("/proc/uptime").read_text().split()[0])
    start_ticks = int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19])
    return now - uptime_s + start_ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    limit = float(os.environ.get("MUONLM_STALL_S", "1800"))
    problems = stalled(Path.cwd(), container_start(), limit, time.time())
    print("\n".join(problems) or "no run is stuck")
    sys.exit(bool(problems))
