"""What users install: wheel and sdist, built and installed as pip would, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# Runs inside the installed tree: prints where things were found, and fails if anything came from elsewhere.
PROBE = """
import pathlib, sys, muonlm, muonlm_kernels
from muonlm.config.load import load_train
site = pathlib.Path(sys.argv[1])
assert site in pathlib.Path(muonlm.__file__).parents, muonlm.__file__
assert site in pathlib.Path(muonlm_kernels.__file__).parents, muonlm_kernels.__file__
for name in sys.argv[2:]:
    load_train(name)
"""


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and return what it printed; its whole output shows when it fails."""
    done = subprocess.run(
        list(command),
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, Path]:
    """(wheel, sdist), built by the backend that pyproject.toml names, fetched as a build does."""
    folder = tmp_path_factory.mktemp("built")
    call(sys.executable, "-m", "pip", "install", "-q", "--target", folder / "hatch", "hatchling>=1.26", cwd=folder)
    command = ("-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(folder / "dist"))
    call(sys.executable, *command, cwd=root, PYTHONPATH=str(folder / "hatch"))
    [wheel], [sdist] = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, built: tuple[Path, Path]) -> Path:
    """The wheel, installed alone; its dependencies come from the environment that runs the tests."""
    site = tmp_path_factory.mktemp("site")
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, built[0], cwd=site)
    return site


def test_wheel_holds_every_module_config_and_the_licence(built: tuple[Path, Path], files: list[Path]) -> None:
    inside = set(zipfile.ZipFile(built[0]).namelist())
    expected = {str(path) for path in files if path.parts[0] == "muonlm"}
    expected |= {str(path.relative_to("kernels")) for path in files if path.parts[:2] == ("kernels", "muonlm_kernels")}
    expected |= {f"muonlm/_{path}" for path in files if path.parts[0] in {"configs", "launch"}}
    assert expected <= inside, sorted(expected - inside)
    assert {name.split("/")[0] for name in inside if ".dist-info/" not in name} == {"muonlm", "muonlm_kernels"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)


def test_installed_wheel_is_complete_without_the_checkout(site: Path, files: list[Path], tmp_path: Path) -> None:
    configs = [path.stem for path in files if path.parent == Path("configs/train") and path.suffix == ".toml"]
    call(sys.executable, "-P", "-c", PROBE, site, *configs, cwd=tmp_path, PYTHONPATH=str(site))
    assert "train" in call(site / "bin" / "muonlm", "--help", cwd=tmp_path, PYTHONPATH=str(site))


def test_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = built
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, sdist, cwd=tmp_path)
    [again] = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_sdist_can_be_worked_on(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", ".ci/run", ".ci/constraints.txt"} <= names
    assert {"tests/conftest.py", "docs/architecture.md"} <= names
