"""`branch_from`: a run goes on from a checkpoint of another under other settings, which is then no longer needed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from muonlm.config.errors import UserError
from muonlm.track.metrics import read_metrics
from muonlm.train.loop import train

SHORT = {
    "loop.steps": 10, "checkpoint.interval_steps": 5, "eval.interval_steps": 0, "schedule.kind": "linear",
    "loop.batch_size": 12, "optim.newton_schulz": {"dtype": "float32"},
}  # fmt: skip


def checkpoint(config, step: int) -> str:
    return f"{config.resolved_run_dir}/checkpoints/step_{step:08d}"


def records(config, kind: str) -> list[dict]:
    return [record for record in read_metrics(config.resolved_run_dir) if record["kind"] == kind]


def test_a_branch_with_the_same_settings_ends_with_the_same_bits(make_config, final_state) -> None:
    old = make_config("old", **SHORT)
    train(old)
    new = make_config("new", **SHORT, branch_from=checkpoint(old, 5))
    assert train(new).step == 10
    mine, theirs = final_state(new), final_state(old)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    assert [(r["step"], r["loss"]) for r in records(new, "train")] == [
        (r["step"], r["loss"]) for r in records(old, "train") if r["step"] > 5
    ]
    (event,) = [r for r in records(new, "event") if r["event"] == "branch"]
    assert event["details"] == {"attempt": 1, "path": checkpoint(old, 5), "optimizer": "kept"}


def test_a_branch_trains_longer_at_another_rate_and_needs_the_old_run_no_more(make_config, train_ranks) -> None:
    old = make_config("old", **SHORT)
    train(old)
    settings = {**SHORT, "loop.steps": 20, "optim.lr": 1e-3, "branch_from": old.resolved_run_dir}
    straight, stopped = make_config("straight", **settings), make_config("stopped", **settings)
    train(straight)
    assert [r["step"] for r in records(straight, "train")] == list(range(11, 21))
    assert records(straight, "train")[0]["lr"]["hidden"] == pytest.approx(1e-3 * 10 / 17)
    assert train_ranks(stopped, at=12)[0].state == "preempted"
    shutil.rmtree(old.resolved_run_dir)
    assert train(stopped).state == "finished"
    assert [(r["step"], r["loss"]) for r in records(stopped, "train")] == [
        (r["step"], r["loss"]) for r in records(straight, "train")
    ]


@pytest.mark.parametrize(
    ("dist", "size"), [({}, 1), ({"zero": 3}, 2), ({"zero": 1}, 3), ({"zero": 2, "engine": "deepspeed"}, 2)]
)
def test_adamw_becomes_muon_on_the_way(make_config, train_ranks, dist, size) -> None:
    """Weights and data go on; momentum begins with zeros, as in the first step of a run."""
    if "engine" in dist:
        pytest.importorskip("deepspeed")
    old = make_config(
        "old", **{key: SHORT[key] for key in SHORT if key != "optim.newton_schulz"}, optim={"kind": "adamw"}
    )
    train(old)
    losses = []
    for name, where, ranks in (("new", dist, size), ("alone", {}, 1)):
        new = make_config(name, **{**SHORT, "loop.steps": 14}, branch_from=checkpoint(old, 5), dist=where)
        assert {status.state for status in train_ranks(new, ranks)} == {"finished"}
        (event,) = [r for r in records(new, "event") if r["event"] == "branch"]
        assert event["details"]["optimizer"] == "new"
        losses.append([r["loss"] for r in records(new, "train")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    theirs = {r["step"]: r["loss"] for r in records(old, "train")}
    assert losses[0][0] == pytest.approx(theirs[6], abs=1e-5)  # the same weights on the same sequences
    assert losses[0][1] != pytest.approx(theirs[7], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"may not change:\n  seed: 0 -> 1"),
        ({"optim.momentum_form": "sum"}, r"optim\.momentum_form: 'ema' -> 'sum'"),
        ({"loop.batch_size": 24}, r"loop\.batch_size: 12 -> 24"),
        ({"model.num_layers": 3}, r"model\.num_layers: 2 -> 3"),
        ({"loop.steps": 5, "schedule.warmup_steps": 1}, "stands at step 10, and this run ends at step 5: raise"),
        (
            {"optim.overrides": [{"names": ["*.q_proj.weight"], "rule": "adamw"}]},
            "needs the same rule for each parameter",
        ),
    ],
)
def test_what_would_mean_something_else_is_refused(make_config, changes, message) -> None:
    old = make_config("old", **SHORT)
    train(old)
    new = make_config("new", **{**SHORT, "loop.steps": 20, **changes}, branch_from=old.resolved_run_dir)
    with pytest.raises(UserError, match=message):
        train(new)
    assert not Path(new.resolved_run_dir, "config.toml").exists()


def test_other_data_are_refused(make_config, stdlib_data, tmp_path) -> None:
    old = make_config("old", **SHORT)
    train(old)
    recorded = Path(old.resolved_run_dir, "environment.json")
    text = recorded.read_text()
    for key in ("tokenizer_fingerprint", "train_fingerprint", "validation_fingerprint"):
        recorded.write_text(text.replace(f'"{key}": "', f'"{key}": "0'))
        with pytest.raises(UserError, match="trained on other data or with another tokenizer"):
            train(make_config("new", **{**SHORT, "loop.steps": 20}, branch_from=old.resolved_run_dir))


def test_what_the_old_run_does_later_makes_no_difference(make_config, train_ranks) -> None:
    """The first step of a branch is preceded by a checkpoint of its own."""
    old = make_config("old", **SHORT)
    train_ranks(old, at=5)
    where = max(Path(old.resolved_run_dir, "checkpoints").iterdir()).name
    settings = {**SHORT, "loop.steps": 16, "checkpoint.interval_steps": 0}
    new = make_config("new", **settings, branch_from=old.resolved_run_dir)
    assert train_ranks(new, at=int(where[5:]) + 1)[0].state == "preempted"
    train(old)
    assert train(new).state == "finished"
    assert [r["event"] for r in records(new, "event")].count("branch") == 1
    (first, *_) = [r for r in records(new, "event") if r["event"] == "checkpoint"]
    assert first["step"] == int(where[5:])
    assert [r["step"] for r in records(new, "train")] == list(range(int(where[5:]) + 1, 17))


def test_fresh_removes_nothing_that_it_branches_from_or_cannot_replace(make_config) -> None:
    old = make_config("old", **SHORT)
    train(old)
    same = make_config("old", **{**SHORT, "loop.steps": 20}, branch_from=checkpoint(old, 5))
    with pytest.raises(UserError, match="lies in the run directory of this run"):
        train(same, fresh=True)
    assert Path(checkpoint(old, 5)).is_dir()
    lost = make_config("old", **SHORT, branch_from=f"{old.resolved_run_dir}-gone")
    with pytest.raises(UserError, match="no such directory"):
        train(lost, fresh=True)
    assert Path(checkpoint(old, 5)).is_dir()


def test_paths_are_taken_however_they_are_written(make_config, monkeypatch) -> None:
    """Relative ones, with a slash behind, renamed; the step is what the checkpoint says."""
    old = make_config("old", **SHORT)
    train(old)
    monkeypatch.chdir(f"{old.resolved_run_dir}/checkpoints")
    Path("step_00000005").rename("best")
    for number, path in enumerate(("best/", "./best", "step_00000010")):
        settings = {**SHORT, "loop.steps": 12}
        train(make_config(f"new {number}", **settings, branch_from=path))
        assert train(make_config(f"new {number}", **settings, branch_from=f"./{path.strip('./')}/")).step == 12
    assert [r["step"] for r in records(make_config("new 0", **SHORT), "train")] == list(range(6, 13))
    with pytest.raises(UserError, match="stands at step 5, and this run ends at step 4"):
        train(make_config("short", **{**SHORT, "loop.steps": 4}, branch_from="best"))
    shutil.copytree("best", "../../copied/step")
    with pytest.raises(UserError, match=r"RUN/checkpoints/step_N beside RUN/config\.toml"):
        train(make_config("other", **SHORT, branch_from="../../copied/step"))
    Path("../environment.json").write_text("{")
    with pytest.raises(UserError, match=r"environment\.json cannot be read"):
        train(make_config("unreadable", **{**SHORT, "loop.steps": 20}, branch_from="best"))


def test_a_run_does_not_go_on_with_other_data(make_config, train_ranks) -> None:
    config = make_config("a", **SHORT)
    train_ranks(config, at=5)
    recorded = Path(config.resolved_run_dir, "environment.json")
    recorded.write_text(recorded.read_text().replace('"train_fingerprint": "', '"train_fingerprint": "0'))
    with pytest.raises(UserError, match="holds other data than when this run began"):
        train(config)


def test_there_must_be_a_checkpoint_and_one_beginning(make_config, tmp_path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        train(make_config("new", **SHORT, branch_from=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="not both"):
        make_config("new", **SHORT, branch_from="a", init_from="b")
