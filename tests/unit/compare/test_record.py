"""What is taken from an earlier invocation, and what is refused: other settings, damaged files, a second process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from muonlm.compare.run import compare
from muonlm.config.errors import UserError

LOCKED = """
import sys
from pathlib import Path
from muonlm.compare.record import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_finished_runs_of_other_settings_are_not_reused(synthetic: ModuleType, training, tmp_path: Path) -> None:
    config = synthetic.make_config(tmp_path)
    slow = config.arms[1].model_copy(update={"name": "slow"})
    compare(config.model_copy(update={"arms": [*config.arms, slow]}))
    compare(config)  # from now on compare.json does not know the arm
    changed = slow.model_copy(update={"set": {**slow.set, "optim.weight_decay": 0.3}})
    training.calls.clear()
    record = (tmp_path / "out" / "compare.json").read_bytes()
    with pytest.raises(UserError, match=r"runs/slow/tune-\S+ holds a run with other settings:\n  optim\.weight_decay:"):
        compare(config.model_copy(update={"arms": [*config.arms, changed]}))
    assert training.calls == []
    assert (tmp_path / "out" / "compare.json").read_bytes() == record


def test_without_compare_json_runs_are_kept_if_their_settings_are_the_same(
    synthetic: ModuleType, training, tmp_path: Path
) -> None:
    result = compare(synthetic.make_config(tmp_path))
    (tmp_path / "out" / "compare.json").unlink()
    training.calls.clear()
    with pytest.raises(UserError, match=r"other settings:\n  data\.seq_len: 128 -> 64\n"):
        compare(synthetic.make_config(tmp_path, set={"data.seq_len": 64}))
    renamed = compare(synthetic.make_config(tmp_path, name="renamed"))
    assert training.calls == []
    assert renamed["trials"] == result["trials"]


def test_diverged_runs_are_held_against_their_settings_too(synthetic: ModuleType, training, tmp_path: Path) -> None:
    training.diverging_lr = 8e-3
    result = compare(synthetic.make_config(tmp_path))
    run_dir = tmp_path / "out" / next(t["run_dir"] for t in result["trials"] if t["state"] == "failed")
    file = run_dir / "config.toml"
    file.write_text(file.read_text().replace("batch_size = 16", "batch_size = 32"))
    with pytest.raises(UserError, match=r"lr0\.008-aux0\.032 holds a run .*\n  loop\.batch_size: 32 -> 16\n"):
        compare(synthetic.make_config(tmp_path))
    shutil.rmtree(run_dir)
    training.calls.clear()
    compare(synthetic.make_config(tmp_path))
    assert training.calls == [str(run_dir)], "the remedy that the message names"


def test_a_finished_run_of_unknown_settings_is_refused(synthetic: ModuleType, training, tmp_path: Path) -> None:
    result = compare(synthetic.make_config(tmp_path))
    (tmp_path / "out" / result["trials"][0]["run_dir"] / "config.toml").unlink()
    with pytest.raises(UserError, match=r"finished run without config\.toml"):
        compare(synthetic.make_config(tmp_path))


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", "\\xff", '{"arms": [], "trials": [{"state": 1}], "decided": {}}', '{"arms": {}}']
)
def test_a_damaged_record_is_refused_with_the_remedy(
    synthetic: ModuleType, training, tmp_path: Path, content: str
) -> None:
    result = compare(synthetic.make_config(tmp_path))
    file = tmp_path / "out" / "compare.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"out/compare\.json is not the record of a comparison: .*Remove it and repeat"):
        compare(synthetic.make_config(tmp_path))
    assert file.read_text(encoding="latin-1") == content
    file.unlink()
    assert compare(synthetic.make_config(tmp_path)) == result


def test_a_second_process_is_refused_and_writes_nothing(synthetic: ModuleType, training, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", LOCKED, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=r"another process runs a comparison in .*out; wait for it"):
            compare(synthetic.make_config(tmp_path))
        assert [path.name for path in out.iterdir()] == [".lock"]
        process.communicate()
    assert compare(synthetic.make_config(tmp_path))["state"] == "finished"
    assert json.loads((out / "compare.json").read_text())["state"] == "finished"
