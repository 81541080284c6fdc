"""A run that is stopped, in whatever way, and repeated is the run that was not stopped, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from muonlm.track.metrics import read_metrics

RANDOM = random.Random()


def _records(config):
    return [r for r in read_metrics(config.resolved_run_dir) if r["kind"] == "train"]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("muon", signal.SIGTERM, signal.SIGKILL),
        ("adamw", signal.SIGKILL, signal.SIGINT),
        ("muon", signal.SIGUSR1, None),
        ("adamw", signal.SIGHUP, None),
    ],
)
def test_stopped_twice_at_random_steps_is_bit_exact(
    make_config, train_ranks, assert_same_run, kind, first, second
) -> None:
    straight, stopped = make_config("straight", **{"optim.kind": kind}), make_config("stopped", **{"optim.kind": kind})
    [status] = train_ranks(straight)
    assert (status.state, status.step) == ("finished", 36)
    seed = RANDOM.randrange(10**6)
    print(f"random steps of seed {seed}")
    steps = (random.Random(seed).randrange(6, 14), random.Random(-seed).randrange(20, 30))
    for at, signum in zip(steps, (first, second), strict=True):
        if signum == signal.SIGKILL:
            with pytest.raises(RuntimeError, match="exit code -9"):
                train_ranks(stopped, at=at, signum=signum)
            assert json.loads(Path(stopped.resolved_run_dir, "status.json").read_text())["state"] == "running"
        elif signum is not None:
            [status] = train_ranks(stopped, at=at, signum=signum)
            assert status.state == "preempted"
            assert at <= status.step <= at + 3
            assert json.loads(Path(stopped.resolved_run_dir, "status.json").read_text())["state"] == "preempted"
    [status] = train_ranks(stopped)
    assert status.state == "finished"
    assert [r["step"] for r in _records(stopped)] == list(range(1, 37))
    assert_same_run(straight, stopped)
    logs = sorted(p.name for p in Path(stopped.resolved_run_dir, "logs").iterdir())
    assert logs == ["attempt_1", "attempt_2", "attempt_3"][: len(logs)]
    assert len(logs) == (3 if second else 2)
    [again] = train_ranks(stopped)
    assert again == status
    assert sorted(p.name for p in Path(stopped.resolved_run_dir, "logs").iterdir()) == logs


@pytest.mark.parametrize("size", [2, 3])
def test_signal_on_one_rank_stops_all_and_resume_is_bit_exact(make_config, train_ranks, assert_same_run, size) -> None:
    """With three ranks, the order in which DDP's buckets are summed shows in the last bits."""
    straight, stopped = make_config("straight"), make_config("stopped")
    train_ranks(straight, size)
    statuses = train_ranks(stopped, size, at=7, signum=signal.SIGTERM, on=1)
    assert {s.state for s in statuses} == {"preempted"}
    assert len({s.step for s in statuses}) == 1
    assert {s.state for s in train_ranks(stopped, size)} == {"finished"}
    assert_same_run(straight, stopped)
    assert sorted(p.name for p in Path(stopped.resolved_run_dir, "logs", "attempt_2").iterdir()) == [
        f"rank_{rank}.log" for rank in range(size)
    ]


def test_saved_on_two_ranks_goes_on_with_one(make_config, train_ranks) -> None:
    """The same data in the same order, weights and momentum: only the rounding of sums differs."""
    exact = {"optim.kind": "muon", "optim.newton_schulz": {"dtype": "float32"}}
    straight, changed = make_config("straight", **exact), make_config("changed", **exact)
    train_ranks(straight)
    [status, _] = train_ranks(changed, 2, at=9, signum=signal.SIGUSR1)
    assert 9 <= status.step < 36
    [status] = train_ranks(changed)
    assert (status.state, status.step) == ("finished", 36)
    ours, theirs = _records(changed), _records(straight)
    assert [r["step"] for r in ours] == list(range(1, 37))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)


def test_torchrun_with_a_signal_to_one_rank_exits_with_0(make_config, tmp_path) -> None:
    config = make_config("torchrun", **{"loop.steps": 4000, "schedule.kind": "cosine"})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "from muonlm.config.schema import TrainConfig\n"
        "from muonlm.train.loop import train\n"
        "here = pathlib.Path(sys.argv[0]).parent\n"
        "(here / f'pid_{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\n"
        "print(train(TrainConfig.model_validate_json((here / 'config.json').read_text())).state)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    process = subprocess.Popen(
        [*command, "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(_records(config)) < 3 and process.poll() is None:
            time.sleep(0.05)
        os.kill(int((tmp_path / "pid_1").read_text()), signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert output.count("preempted") == 2
    status = json.loads(Path(config.resolved_run_dir, "status.json").read_text())
    assert status["state"] == "preempted"
    assert Path(config.resolved_run_dir, "checkpoints", f"step_{status['step']:08d}", "complete.json").exists()
