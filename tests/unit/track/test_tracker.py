"""Where records go: the file, the terminal, TensorBoard and wandb, each read back with its own reader."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.track.console import ConsoleSink
from muonlm.track.metrics import MetricsWriter, read_metrics
from muonlm.track.tracker import Tracker

TRAIN = {
    "step": 5, "tokens": 500, "time_s": 1.0, "loss": 3.25, "step_s": 0.5, "tokens_per_s": 12345.6, "optimizer_s": 0.1,
    "optimizer_share": 0.2, "lr": {"hidden": 0.004, "head": 0.03}, "grad_norm": 1.5,
}  # fmt: skip
EVAL = {"step": 5, "tokens": 500, "time_s": 1.0, "loss": 3.5, "bits_per_byte": 1.75, "eval_tokens": 64, "final": False}
EVENT = {"step": 5, "event": "checkpoint", "details": {"path": "checkpoints/step_00000005"}}


def _config(**track) -> TrainConfig:
    raw = {
        "name": "tracked", "data": {"path": "unused"}, "loop": {"steps": 10}, "schedule": {"warmup_steps": 0},
        "track": {"console": False, **track},
    }  # fmt: skip
    return TrainConfig.model_validate(raw)


def _write_all(tracker: Tracker) -> None:
    with tracker:
        tracker.train(TRAIN)
        tracker.eval(EVAL)
        tracker.eval({**EVAL, "final": True, "loss": 3.0})
        tracker.event(EVENT)


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys) -> None:
    _write_all(Tracker(_config(console=True), tmp_path, is_main=True, num_steps=10))
    assert capsys.readouterr().out.splitlines() == [
        "step 5/10  loss 3.2500  12,346 tokens/s  optimizer 20%  eta 0:00:02",
        "step 5  eval loss 3.5000  1.7500 bits/byte on 64 tokens",
        "step 5  final eval loss 3.0000  1.7500 bits/byte on 64 tokens",
        "step 5  checkpoint  path checkpoints/step_00000005",
    ]


def test_other_ranks_and_a_silent_console_write_nothing(tmp_path, capsys) -> None:
    _write_all(Tracker(_config(console=True, tensorboard=True), tmp_path, is_main=False, num_steps=10))
    assert list(tmp_path.iterdir()) == []
    _write_all(Tracker(_config(), tmp_path, is_main=True, num_steps=10))
    assert capsys.readouterr().out == ""
    assert [r["kind"] for r in read_metrics(tmp_path)] == ["train", "eval", "eval", "event"]


def test_live_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = ConsoleSink("tracked", 10, 0, stream)
    console.write("eval", EVAL)
    console.write("train", TRAIN)
    console.close()
    text = stream.getvalue()
    assert "5/10" in text
    assert "3.2500" in text
    assert "eval 3.5000" in text
    assert "eval loss 3.5000" in text


def test_records_after_the_checkpoint_are_removed_when_a_run_goes_on(tmp_path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in (4, 5, 6):
        writer.write("train", {"step": step})
    writer.close()
    _write_all(Tracker(_config(), tmp_path, is_main=True, num_steps=10, start_step=4))
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"] == [4, 5]


def test_tokens_ratio_is_added_and_the_final_one_is_that_of_the_same_step(tmp_path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    writer = MetricsWriter(reference)
    for tokens, loss in ((500, 4.0), (2000, 3.0)):
        writer.write("eval", {**EVAL, "tokens": tokens, "loss": loss})
    writer.close()
    run = tmp_path / "run"
    run.mkdir()
    _write_all(Tracker(_config(reference=str(reference)), run, is_main=True, num_steps=10))
    ratios = [r["tokens_ratio"] for r in read_metrics(run) if r["kind"] == "eval"]
    assert ratios == [pytest.approx(2.0), pytest.approx(2.0)]  # 3.5 lies half-way: sqrt(500 x 2000) = 1000


def test_tensorboard_event_files_can_be_read(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    _write_all(Tracker(_config(tensorboard=True), tmp_path, is_main=True, num_steps=10))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [point] = events.Scalars("train/loss")
    assert (point.step, point.value) == (5, 3.25)
    assert events.Scalars("train/lr/hidden")[0].value == pytest.approx(0.004)
    assert events.Scalars("eval/loss")[0].value == 3.5
    assert events.Scalars("final/loss")[0].value == 3.0


def test_wandb_writes_an_offline_run(tmp_path) -> None:
    """In a process of its own, because wandb starts a service that outlives the call."""
    pytest.importorskip("wandb")
    code = (
        "from muonlm.config.schema import TrainConfig\nfrom muonlm.track.tracker import Tracker\n"
        f"config = TrainConfig.model_validate_json({_config(wandb='offline').model_dump_json()!r})\n"
        f"tracker = Tracker(config, {str(tmp_path)!r}, is_main=True, num_steps=10)\n"
        f"tracker.train({TRAIN!r})\ntracker.eval({EVAL!r})\ntracker.close()\n"
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "WANDB_SILENT": "true", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path, timeout=60)
    run_id = (tmp_path / "wandb_id").read_text().strip()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    stored = (folder / f"run-{run_id}.wandb").read_bytes()
    for key in (b"train/loss", b"train/lr/hidden", b"eval/bits_per_byte"):
        assert key in stored


@pytest.mark.parametrize(
    ("option", "module"),
    [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": "offline"}, "wandb")],
)
def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, option, module) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs the package .*pip install 'muonlm\[tracking\]'"):
        Tracker(_config(**option), tmp_path, is_main=True, num_steps=10)


def test_a_terminal_that_has_gone_does_not_stop_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    sink = ConsoleSink("name", 10, 0, Gone())
    sink.write("train", TRAIN)
    sink.write("train", TRAIN)
    sink.close()
