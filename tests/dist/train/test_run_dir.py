"""Who may write a run directory, and what a repeated or changed command does to it."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
import tomllib
from pathlib import Path

import pytest

from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.track.metrics import read_metrics
from muonlm.train import run_dir
from muonlm.train.disk import LogFile
from muonlm.train.loop import train
from muonlm.train.preemption import StopSignals
from muonlm.train.run_dir import config_differences

SHORT = {"loop.steps": 4, "checkpoint.interval_steps": 2}


def test_contents_of_a_finished_run(make_config) -> None:
    config = make_config(**SHORT, **{"track.peak_flops": 1e12})
    status = train(config)
    path = Path(config.resolved_run_dir)
    assert TrainConfig.model_validate(tomllib.loads((path / "config.toml").read_text())) == config
    assert json.loads((path / "status.json").read_text()) == {
        "schema": 1, "state": "finished", "step": 4, "num_steps": 4, "tokens": 4 * 6 * 32, "attempt": 1,
        "final_loss": status.final_loss, "error": None, "seconds": status.seconds,
    }  # fmt: skip
    environment = json.loads((path / "environment.json").read_text())
    assert {"torch", "python", "git", "device", "threads", "precision", "newton_schulz_dtype"} <= environment.keys()
    assert "model.layers.0.self_attn.q_proj.weight" in (path / "rules.txt").read_text()
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    records = read_metrics(path)
    assert [(r["kind"], r["step"]) for r in records if r["kind"] != "event"] == [
        ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("eval", 4), ("eval", 4),
    ]  # fmt: skip
    train_record = next(r for r in records if r["kind"] == "train" and r["step"] == 3)
    assert train_record["tokens"] == 3 * 6 * 32
    assert train_record["tokens_per_s"] * train_record["step_s"] == pytest.approx(6 * 32)
    assert train_record["optimizer_share"] == pytest.approx(train_record["optimizer_s"] / train_record["step_s"])
    assert train_record["lr"]["hidden"] == pytest.approx(config.optim.lr * 3 / 4 * min(1.0, 2 / 2))
    assert 0 < train_record["mfu"] < 1
    assert [r["eval_tokens"] for r in records if r["kind"] == "eval"] == [6 * 32, 9 * 32]
    assert records[-1]["event"] == "finished"
    for record in records:
        assert record["schema"] == 1


def test_another_configuration_is_refused_and_names_the_keys(make_config) -> None:
    train(make_config(**SHORT))
    before = Path(make_config().resolved_run_dir, "status.json").read_text()
    with pytest.raises(UserError) as caught:
        train(make_config(**SHORT, **{"optim.lr": 0.5, "eval.interval_steps": 3, "seed": 4}))
    message = str(caught.value)
    assert "optim.lr: 0.004 -> 0.5" in message
    assert "eval.interval_steps: 8 -> 3" in message
    assert "seed: 0 -> 4" in message
    assert "loop.steps" not in message
    assert "--fresh" in message
    assert "run_dir" in message
    assert Path(make_config().resolved_run_dir, "status.json").read_text() == before


def test_what_may_differ(make_config) -> None:
    one = make_config().model_dump()
    free = {"track.interval_steps": 3, "checkpoint.keep": 7, "loop.threads": 2, "loop.micro_batch_size": 1}
    other = make_config("elsewhere", **free, **{"dist.timeout_s": 5.0}).model_dump()
    assert config_differences(one, other) == []
    assert config_differences(one, make_config(**{"eval.tokens": 5}).model_dump()) == ["eval.tokens: 200 -> 5"]


def test_fresh_starts_over_and_touches_nothing_else(make_config) -> None:
    config = make_config(**SHORT)
    train(config)
    path = Path(config.resolved_run_dir)
    (path / "notes.txt").write_text("mine")
    sibling = path.parent / "checkpoints"
    sibling.mkdir()
    changed = make_config(**SHORT, seed=5)
    status = train(changed, fresh=True)
    assert (status.state, status.step) == ("finished", 4)
    assert (path / "notes.txt").read_text() == "mine"
    assert sibling.exists()
    assert [r["step"] for r in read_metrics(path) if r["kind"] == "train"] == [1, 2, 3, 4]
    assert tomllib.loads((path / "config.toml").read_text())["seed"] == 5
    assert sorted(p.name for p in (path / "logs").iterdir()) == ["attempt_1", "attempt_2"]


def test_two_processes_cannot_share_a_run_directory(make_config) -> None:
    config = make_config(**{"loop.steps": 5000})
    other = multiprocessing.get_context("fork").Process(target=train, args=(config,))
    other.start()
    try:
        while not any(r["kind"] == "train" for r in read_metrics(config.resolved_run_dir)):
            assert other.is_alive()
            time.sleep(0.01)
        for fresh in (False, True):
            with pytest.raises(UserError, match="another process trains in"):
                train(config, fresh=fresh)
    finally:
        other.terminate()
        other.join(20)
    assert other.exitcode == 0
    assert json.loads(Path(config.resolved_run_dir, "status.json").read_text())["state"] == "preempted"


def test_a_directory_that_cannot_be_written(make_config, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory; set run_dir"):
        train(make_config("file/run"))


def test_an_incomplete_checkpoint_is_passed_over(make_config, caplog) -> None:
    config = make_config(**SHORT)
    first = train(config)
    path = Path(config.resolved_run_dir)
    (path / "status.json").unlink()
    [data] = (path / "checkpoints" / "step_00000004").glob("*.distcp")
    os.truncate(data, data.stat().st_size - 1)
    again = train(config)
    assert "step_00000004 is incomplete" in caplog.text
    assert again.final_loss == first.final_loss
    events = [(r["event"], r["step"]) for r in read_metrics(path) if r["kind"] == "event"]
    assert ("resume", 2) in events
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


def test_recorded_precision_outlives_the_probe(make_config, monkeypatch) -> None:
    """A resumed run computes in the precision it began with, whatever the machine looks like now."""
    from muonlm.train import setup

    config = make_config(**SHORT, **{"loop.precision": "auto"})
    monkeypatch.setattr(setup, "bfloat16_is_fast", lambda device: True)
    train(config)
    path = Path(config.resolved_run_dir)
    assert json.loads((path / "environment.json").read_text())["precision"] == "bfloat16"
    (path / "status.json").unlink()
    monkeypatch.setattr(setup, "bfloat16_is_fast", lambda device: False)
    train(config)
    environment = json.loads((path / "environment.json").read_text())
    assert (environment["precision"], environment["newton_schulz_dtype"]) == ("bfloat16", "bfloat16")
    train(make_config("b", **SHORT, **{"loop.precision": "auto"}))
    environment = json.loads((path.parent / "b" / "environment.json").read_text())
    assert (environment["precision"], environment["newton_schulz_dtype"]) == ("float32", "float32")


def test_second_interrupt_kills_but_not_the_echo_of_the_first(run_ranks, tmp_path) -> None:
    def one_rank(rank, size):
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            (tmp_path / "alive").write_text(str(stop.name))
            stop._interrupted_at -= 2.0
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(RuntimeError, match="exit code -2"):
        run_ranks(one_rank, 1, join=False)
    assert (tmp_path / "alive").read_text() == "SIGINT"


def test_handlers_are_restored_and_absent_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals():
        assert signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before
    flags = []

    def elsewhere() -> None:
        with StopSignals() as stop:
            flags.append(stop.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert flags == [False]


def test_an_interrupted_fresh_still_says_whose_the_directory_is(make_config, monkeypatch) -> None:
    config = make_config(**SHORT)
    train(config)
    original, removed = Path.unlink, []

    def unlink(self: Path, missing_ok: bool = False) -> None:
        removed.append(self.name)
        original(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    run_dir._remove_run(Path(config.resolved_run_dir))
    assert removed[-1] == "config.toml"
    assert "status.json" in removed


def test_fresh_wants_the_config_of_a_run(make_config) -> None:
    config = make_config(**SHORT)
    path = Path(config.resolved_run_dir)
    (path / "figures").mkdir(parents=True)
    for other in ('name = "x"\ndata = "y"\nloop = 1\n', "not toml"):
        (path / "config.toml").write_text(other)
        with pytest.raises(UserError, match=r"--fresh would remove figures, config\.toml"):
            train(config, fresh=True)
    assert (path / "figures").exists()


def test_a_finished_status_with_values_of_no_kind_is_made_anew(make_config) -> None:
    config = make_config(**SHORT)
    status = train(config)
    file = Path(config.resolved_run_dir) / "status.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokens": "many"}))
    assert train(config) == status


def test_a_lost_precision_is_told(make_config, caplog) -> None:
    config = make_config(**SHORT, **{"loop.precision": "auto"})
    train(config)
    path = Path(config.resolved_run_dir)
    (path / "status.json").unlink()
    (path / "environment.json").write_text('{"precision": "foo"}')
    train(config)
    assert "does not say in which precision" in caplog.text


def test_a_full_disk_on_the_main_rank_ends_the_others_with_a_reason(make_config, run_ranks) -> None:
    config = make_config()

    def one_rank(rank, size):
        original = run_dir.write_atomically

        def full(path: Path, text: str) -> None:
            if rank == 0 and path.name == "status.json" and '"step": 3' in text:
                raise UserError("status.json cannot be written: No space left on device")
            original(path, text)

        run_dir.write_atomically = full
        with pytest.raises(UserError) as caught:
            train(config)
        return str(caught.value)

    first, second = run_ranks(one_rank, 2, join=False)
    assert "No space left" in first
    assert "rank 1: another rank has ended or hangs, and its message says why" in second


def test_a_full_disk_cuts_the_log_short_without_a_traceback(tmp_path, capsys) -> None:
    handler = LogFile(tmp_path / "log")
    handler.stream.close()
    handler.stream = open("/dev/full", "w")  # noqa: SIM115
    handler.emit(logging.LogRecord("a", logging.INFO, "b", 1, "text", (), None))
    assert capsys.readouterr().err == ""


def test_the_error_that_ended_a_run_is_not_hidden_by_a_full_disk(make_config, monkeypatch) -> None:
    original = Path.write_text

    def write_text(self: Path, text: str, **how: str) -> int:
        if '"failed"' in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, text, **how)

    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr("muonlm.train.loop.check_finite", lambda *_: (_ for _ in ()).throw(ZeroDivisionError("cause")))
    with pytest.raises(ZeroDivisionError, match="cause"):
        train(make_config(**SHORT))
