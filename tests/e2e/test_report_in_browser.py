"""The report opens from disk in a real browser, with no network and no error."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from muonlm.report.build import build_report
from muonlm.track.metrics import read_metrics
from muonlm.train.loop import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    # Any name lookup fails at once, so a page that needs the network shows itself.
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=3000"),
]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_report_of_a_run_renders(tmp_path: Path, stdlib_data: Path):
    from muonlm.config.load import load_train

    run = tmp_path / "run"
    train(
        load_train("smoke", [f"run_dir={run}", f"data.path={stdlib_data}", "track.console=false", "checkpoint.keep=1"])
    )
    page = build_report(run)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    result = subprocess.run(
        [*command, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
    )
    final = next(r["loss"] for r in read_metrics(run) if r["kind"] == "eval" and r["final"])
    assert f"{final:.4f}" in result.stdout
    assert result.stdout.count("<svg") >= 2
    assert "CONSOLE" not in result.stderr
    shot = tmp_path / "report.png"
    subprocess.run(
        [*command, f"--screenshot={shot}", "--window-size=1280,2000", f"file://{page}"],
        capture_output=True,
        timeout=120,
        check=True,
    )
    from matplotlib.image import imread

    pixels = imread(shot)
    assert pixels.shape[:2] == (2000, 1280)
    assert len({tuple(color) for color in pixels[::7, ::7, :3].reshape(-1, 3).round(2)}) > 20
