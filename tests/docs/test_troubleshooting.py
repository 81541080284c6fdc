"""docs/troubleshooting.md quotes messages that the sources really have, and its commands run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS, _, OTHERS = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Not from muonlm")
QUOTED = re.findall(r"^### `(.+)`$", OURS, re.MULTILINE)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", OURS, re.DOTALL) for line in block.splitlines()]


def spoken(function: ast.AST) -> str:
    """All text that stands in a function but its docstring, pieces of it on lines of their own."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.JoinedStr):
            found.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    docstring = ast.get_docstring(function, clean=False) if isinstance(function, ast.FunctionDef) else None
    return "\n".join(text for text in found if text != docstring)


@cache
def functions() -> tuple[str, ...]:
    """What each function of muonlm can say."""
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "muonlm").rglob("*.py"))]
    return tuple(spoken(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def is_said(quoted: str) -> bool:
    """Whether one function has all the parts of a message between its `…`."""
    parts = [part.strip(" ,;:?") for part in quoted.split("…")]
    return any(all(part in text for part in parts) for text in functions())


def test_there_is_much_to_check():
    assert len(QUOTED) >= 25
    assert len(COMMANDS) >= 3
    assert all(max(map(len, quoted.split("…"))) >= 12 for quoted in QUOTED), "a part long enough to tell messages apart"
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_message_is_in_the_sources(quoted: str):
    assert is_said(quoted), f"no function of muonlm says: {quoted}"


def test_other_messages_are_not_found():
    assert not is_said("CUDA out of memory, buy another GPU")
    assert not is_said("loop.batch_size … is not divisible by the phase of the moon")
    # Parts of two messages of different functions are no message.
    assert not is_said("loop.device: rank with LOCAL_RANK=… is not UTF-8: byte …")


def test_what_torch_says_is_not_called_ours():
    """The last table is for messages of others: what muonlm says belongs above, where it is held to the sources."""
    cells = re.findall(r"^\| (.+?) \|", OTHERS, re.MULTILINE)[1:]
    assert len(cells) >= 8
    assert [cell for cell in cells for text in re.findall(r"`(.+?)`", cell) if len(text) > 25 and is_said(text)] == []


@pytest.mark.parametrize("line", [pytest.param(c, marks=pytest.mark.slow if "--probe" in c else ()) for c in COMMANDS])
def test_command_runs(line: str, tmp_path: Path):
    words = shlex.split(line)
    module = {"muonlm": "muonlm", "torchrun": "torch.distributed.run"}[words[0]]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-m", module, *words[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    said = done.stderr if words[0] == "torchrun" else done.stdout
    assert ("2 ranks" if words[0] == "torchrun" else "Try: muonlm train smoke") in said
