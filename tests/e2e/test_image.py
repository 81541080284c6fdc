"""The image is built from its Dockerfile without an engine, and does what docs/docker.md says of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
PROGRAMS = ("buildah", "debootstrap")


def install() -> None:
    """buildah and debootstrap from Debian's or Ubuntu's packages; skips where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("debootstrap and the chroot of the build need root")
    if all(shutil.which(program) for program in PROGRAMS):
        return
    if shutil.which("apt-get") is None:
        pytest.skip(f"no {' and '.join(PROGRAMS)} here, and no apt-get to install them")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with FileLock(str(Path(tempfile.gettempdir()) / "muonlm-apt.lock")):
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PROGRAMS]):
            done = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, timeout=240, check=False
            )
            if done.returncode:
                pytest.skip(f"apt-get {command[0]} failed: {done.stderr[-500:]}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_image_is_built_and_trains(tmp_path: Path):
    """build-local.sh fails by itself if a run inside fails, or a build tool is in the last stage."""
    install()
    if shutil.disk_usage(tmp_path).free < 8 << 30:
        pytest.skip("less than 8 GB of disk are free")
    result = tmp_path / "result.json"
    done = subprocess.run(
        ["bash", str(ROOT / "docker" / "build-local.sh"), str(result)],
        env={**os.environ, "PYTHON": sys.executable, "EXTRAS": "triton", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    found = json.loads(result.read_text())
    assert found["uid"] == 1000
    assert found["user"] == "1000:1000"
    assert found["runs"] == {"local": "finished", "two": "finished", "other": "finished"}
    assert found["owners"] == [1000, 4321]
    assert found["entrypoint"] == ["entrypoint.sh"]
    assert found["healthcheck"] == ["CMD", "healthcheck.py"]
    assert found["triton_without_compiler"] is (True if shutil.which("gcc") else None)
    assert found["labels"]["org.opencontainers.image.title"] == "muonlm"
    assert found["layers"] <= 12
    assert [path for path in tmp_path.iterdir() if path != result] == [], "the script cleans up after itself"
