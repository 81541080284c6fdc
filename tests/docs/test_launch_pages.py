"""The commands of docs/multi-node.md and docs/slurm.md are accepted, and those that need one host alone run.

What needs a second host or a cluster runs in tests/e2e, which reads the same pages.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from muonlm.cli.main import main

ROOT = Path(__file__).parents[2]


def commands(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines]


SUBMITTED = [line for page in ("multi-node.md", "slurm.md") for line in commands(page) if line.startswith("muonlm")]


def test_pages_show_commands_of_muonlm_and_slurm_alone() -> None:
    assert len(SUBMITTED) >= 7
    others = {line.split()[0] for page in ("multi-node.md", "slurm.md") for line in commands(page)} - {"muonlm"}
    assert others <= {"squeue", "scontrol", "scancel"}  # run by tests/e2e/test_slurm.py


@pytest.mark.parametrize("line", SUBMITTED)
def test_every_command_is_accepted(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    code = main([*words, "--dry-run"] if "--dry-run" not in words else words)
    if "--elastic" in words:  # the page says so, and what helps
        assert code == 2
        assert "on 3 ranks: loop.batch_size 32 is not divisible by 3" in capsys.readouterr().err
        assert main([word.replace("=32", "=48") for word in words]) == 0
    else:
        assert code == 0


def test_the_command_for_this_host_trains(stdlib_data: Path, tmp_path: Path, run_python) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stdlib").symlink_to(stdlib_data)
    [line] = [line for line in SUBMITTED if "--dry-run" not in line and "torchrun" in line and "--nodes" not in line]
    done = run_python("-m", *shlex.split(line), "loop.steps=6")
    assert done.returncode == 0, done.stderr
    assert "finished at step 6" in done.stdout
    assert "start-up: 2 ranks over gloo on 1 host" in done.stderr


def test_quoted_messages_are_those_of_the_code() -> None:
    """The tables name symptoms by the words that a user sees."""
    sources = "".join(path.read_text() for path in (ROOT / "muonlm").glob("[dl]*/*.py"))
    sources += "".join(path.read_text() for path in (ROOT / "launch").glob("*.j2"))
    sources = re.sub(r'"\n\s+f?"', "", sources)
    for words in (
        "did not come within",
        "start-up: waiting for",
        "would use gloo over",
        "first all-reduce did not end within",
        "joined but did not take part",
        "is not on this machine's PATH",
        "refused the job:",
        "tasks here",
        "but WORLD_SIZE is not set",
        "queued again",
        "on this machine",
    ):
        assert words in sources, words
        assert any(words in (ROOT / "docs" / page).read_text() for page in ("multi-node.md", "slurm.md")), words
