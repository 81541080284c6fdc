"""The files of the checkout and the parsed sources of the packages, for the rules of the house."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def files() -> list[Path]:
    """Every file that git tracks or would track, relative to the root. An unpacked sdist has no git and skips."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout, so what belongs to the project is not known")
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in sorted(set(listing.split("\0")) - {""}) if (ROOT / (path := Path(name))).is_file()]


@pytest.fixture(scope="session")
def sources() -> dict[str, ast.Module]:
    """Parsed modules of `muonlm` and `muonlm_kernels`, by dotted name; packages appear as `name.__init__`."""
    found = {}
    for base, package in ((ROOT, "muonlm"), (ROOT / "kernels", "muonlm_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            found[".".join(path.relative_to(base).with_suffix("").parts)] = ast.parse(path.read_text(), str(path))
    return found
