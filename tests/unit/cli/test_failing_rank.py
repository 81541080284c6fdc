"""How a command ends that fails as one of torchrun's ranks: at once, because freeing what it holds can deadlock."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from muonlm.cli import main, train
class Held:
    def __del__(self):
        print("freed", file=sys.stderr)
def fail(args):
    held = Held()
    raise {error}
train.run = fail
sys.exit(main.main(["train", "smoke"]))
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [("main.UserError('no such thing')", 2, "no such thing"), ("RuntimeError('a fault')", 1, "RuntimeError: a fault")],
)
@pytest.mark.parametrize("is_rank", [True, False])
def test_what_a_failed_rank_holds_is_not_freed(error: str, code: int, said: str, is_rank: bool) -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"} if is_rank else os.environ
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(error=error)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert said in done.stderr
    assert ("freed" in done.stderr) is not is_rank
