"""Print the requirements of pyproject.toml, one a line, with those of the extras that are given as `a,b`."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(project: dict, extras: list[str]) -> list[str]:
    """The project's own dependencies, then those of each extra. Raises SystemExit for an extra that it lacks."""
    optional = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        sys.exit(f"EXTRAS: pyproject.toml has no extra {', '.join(unknown)}; it has {', '.join(optional)}")
    found = [*project["dependencies"]]
    for extra in extras:
        found += optional[extra]
    return found


if __name__ == "__main__":
    table = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    print(*requirements(table, [extra for extra in sys.argv[1].split(",") if extra]), sep="\n")
