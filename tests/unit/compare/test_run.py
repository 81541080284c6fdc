"""The whole comparison on a synthetic training loop whose token ratio is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from muonlm.compare.analysis import eval_curve
from muonlm.compare.ratio import SeedRatio, summarise
from muonlm.compare.run import compare
from muonlm.compare.verdict import decide
from muonlm.config.errors import UserError


def budget(result: dict) -> dict:
    return next(r for r in result["ratios"] if r["method"] == "budget")


def test_the_planted_ratio_is_found(synthetic: ModuleType, training, tmp_path: Path) -> None:
    result = compare(synthetic.make_config(tmp_path))
    assert result == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert result["state"] == "finished"
    assert [(arm["best"]["lr"], arm["best"]["aux_lr"]) for arm in result["arms"]] == list(synthetic.BEST.values())
    assert budget(result)["mean"] == pytest.approx(synthetic.RATIO, rel=1e-6)
    assert budget(result)["low"] > 1
    assert budget(result)["wall_clock"]["mean"] == pytest.approx(synthetic.RATIO * 75 / 85, rel=1e-6)
    assert result["verdict"]["reproduced"] is True
    assert "Nothing follows for larger models" in result["verdict"]["text"]
    in_run = next(r for r in result["ratios"] if r["method"] == "in_run")
    assert 1 < in_run["mean"] < synthetic.RATIO, "before its decay the arm has not reached its end loss"


def test_no_run_is_trained_twice(synthetic: ModuleType, training, tmp_path: Path) -> None:
    result = compare(synthetic.make_config(tmp_path))
    assert len(training.calls) == len(set(training.calls)) == (6 + 2) + (6 + 8)
    shared = [t for t in result["trials"] if t["phase"] == "final" and "/tune-" in t["run_dir"]]
    assert [(t["arm"], t["budget_tokens"], t["seed"]) for t in shared] == [("adamw", 1048576, 0), ("muon", 1048576, 0)]
    assert all((tmp_path / "out" / t["run_dir"] / "status.json").exists() for t in result["trials"])

    training.calls.clear()
    assert compare(synthetic.make_config(tmp_path)) == result
    assert training.calls == []


def test_an_interrupted_comparison_goes_on(synthetic: ModuleType, training, tmp_path: Path) -> None:
    training.stop_after = 9
    first = compare(synthetic.make_config(tmp_path))
    assert first["state"] == "interrupted"
    assert first["ratios"] == []
    assert first["verdict"]["reproduced"] is None
    done = {t["run_dir"] for t in first["trials"] if t["state"] == "finished"}
    assert len(done) in (8, 9)

    training.stop_after, training.calls = float("inf"), []
    assert compare(synthetic.make_config(tmp_path))["state"] == "finished"
    assert not done & {str(Path(call).relative_to(tmp_path / "out")) for call in training.calls}
    assert len(training.calls) + len(done) == 22


def test_growing_a_grid_keeps_what_is_done(synthetic: ModuleType, training, tmp_path: Path) -> None:
    compare(synthetic.make_config(tmp_path, seeds=[0, 1]))
    training.calls.clear()
    compare(synthetic.make_config(tmp_path, seeds=[0, 1, 2]))
    assert len(training.calls) == 1 + 3
    assert all("-s2-" in call for call in training.calls)


def test_a_changed_setting_is_refused_by_name(synthetic: ModuleType, training, tmp_path: Path) -> None:
    compare(synthetic.make_config(tmp_path))
    with pytest.raises(UserError, match=r"other settings for arm adamw:\n  model\.num_layers: 4 -> 6"):
        compare(synthetic.make_config(tmp_path, set={"model.num_layers": 6}))


def test_diverged_runs_count_as_infinite_loss_and_are_not_repeated(
    synthetic: ModuleType, training, tmp_path: Path
) -> None:
    training.diverging_lr = 8e-3
    result = compare(synthetic.make_config(tmp_path))
    failed = [t for t in result["trials"] if t["state"] == "failed"]
    assert [(t["arm"], t["lr"], t["final_loss"]) for t in failed] == [("muon", 8e-3, None)]
    assert "non-finite" in failed[0]["error"]
    assert result["arms"][1]["best"]["lr_is_interior"] is True
    assert result["verdict"]["reproduced"] is True
    training.calls.clear()
    compare(synthetic.make_config(tmp_path))
    assert training.calls == []


def test_all_runs_of_an_arm_diverging_is_an_error(synthetic: ModuleType, training, tmp_path: Path) -> None:
    training.diverging_lr = 1e-3
    with pytest.raises(UserError, match="arm muon: every run of the lr sweep diverged"):
        compare(synthetic.make_config(tmp_path))
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["state"] == "interrupted"


def test_an_optimum_at_the_edge_forbids_the_claim(synthetic: ModuleType, training, tmp_path: Path) -> None:
    """The badly tuned baseline: AdamW's grid ends below its optimum, and the ratio comes out too large."""
    config = synthetic.make_config(tmp_path)
    weak = config.arms[0].model_copy(update={"lr": [2.5e-4, 5e-4, 1e-3, 1.6e-3]})
    result = compare(config.model_copy(update={"arms": [weak, config.arms[1]]}))
    assert budget(result)["mean"] > synthetic.RATIO
    assert result["verdict"]["reproduced"] is None
    assert "best lr of adamw is the highest that was tried (0.0016)" in result["verdict"]["text"]
    assert "extend it upwards before believing the ratio" in result["verdict"]["text"]


def test_a_bad_reference_budget_leaves_the_ratio_censored(synthetic: ModuleType, training, tmp_path: Path) -> None:
    config = synthetic.make_config(tmp_path)
    muon = config.arms[1].model_copy(update={"budgets_tokens": [983040, 1048576]})
    result = compare(config.model_copy(update={"arms": [config.arms[0], muon]}))
    assert budget(result)["mean"] is None
    assert {s["censored"] for s in budget(result)["per_seed"]} == {">"}
    assert result["verdict"]["reproduced"] is None
    assert "mean over seeds > 1.07" in result["verdict"]["text"]


def test_equal_optimizers_are_no_saving(synthetic: ModuleType, training, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "RATIO", 1.0)
    monkeypatch.setattr(synthetic, "NOISE", 0.004)
    reference = {"budgets_tokens": [786432, 917504, 1048576]}
    result = compare(synthetic.make_config(tmp_path, **reference))
    assert budget(result)["low"] < 1 < budget(result)["high"]
    assert result["verdict"]["reproduced"] is False
    assert "the interval includes 1" in result["verdict"]["text"]


def test_in_run_curves_leave_out_an_evaluation_on_other_sequences() -> None:
    common = {"kind": "eval", "step": 1}
    small = [common | {"tokens": t, "loss": loss, "eval_tokens": 64} for t, loss in ((0, 9.0), (10, 5.0), (20, 4.0))]
    records = [*small, {"kind": "train", "tokens": 20}, common | {"tokens": 20, "loss": 3.0, "eval_tokens": 512}]
    assert eval_curve(records) == {10: 5.0, 20: 4.0}


@pytest.mark.parametrize(("interpolated", "reproduced"), [("arm", True), ("reference", None)])
def test_wide_gaps_forbid_the_claim_only_where_they_flatter_the_arm(interpolated: str, reproduced: bool | None) -> None:
    best = {"lr": 2.0, "aux_lr": 2.0, "lr_is_interior": True, "aux_lr_is_interior": True}
    arms = [{"name": name, "lr": [1.0, 2.0, 3.0], "aux_lr": [1.0, 2.0, 3.0], "best": best} for name in "ab"]
    seeds = [SeedRatio(seed, ratio, interpolated=interpolated, gap=1.5) for seed, ratio in ((0, 1.2), (1, 1.21))]  # type: ignore[arg-type]
    verdict = decide([summarise("b", "budget", seeds, [1.0, 1.0])], arms, "a", "")
    assert verdict["reproduced"] is reproduced
    assert "1.50 times apart" in verdict["text"]
