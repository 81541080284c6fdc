"""Which runs are needed, in which order, and what an unfair comparison is refused for."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from muonlm.compare.run import compare
from muonlm.compare.trials import Trial, plan_arms, train_configs, trial_config
from muonlm.config.errors import UserError


@pytest.fixture
def config(synthetic: ModuleType, tmp_path: Path):
    return synthetic.make_config(tmp_path)


def test_lr_first_at_the_middle_aux_then_aux_at_the_best_lr_then_finals(config) -> None:
    muon = plan_arms(config)[1]
    assert [(t.lr, t.aux_lr) for t in muon.all_trials({})] == [(lr, 3.2e-2) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]

    losses = {t.point: loss for t, loss in zip(muon.lr_sweep(), (3.0, 2.0, 1.0, float("inf")))}
    aux = [t for t in muon.all_trials(losses) if t.point not in losses]
    assert [(t.lr, t.aux_lr, t.phase) for t in aux] == [(4e-3, 1.6e-2, "tune"), (4e-3, 6.4e-2, "tune")]

    losses |= {t.point: loss for t, loss in zip(aux, (0.9, 1.1))}
    best = muon.best(losses)
    assert (best.lr, best.aux_lr, best.loss) == (4e-3, 1.6e-2, 0.9)
    assert best.lr_is_interior, "a diverged neighbour is a neighbour"
    assert not best.aux_lr_is_interior
    finals = muon.final_trials(losses)
    assert {(t.lr, t.aux_lr) for t in finals} == {(4e-3, 1.6e-2)}
    assert [(t.budget_tokens, t.seed) for t in finals][:4] == [(786432, 0), (786432, 1), (786432, 2), (917504, 0)]
    assert len(finals) == 9


def test_number_of_tokens_is_known_beforehand(config) -> None:
    adamw = plan_arms(config)[0]
    # 4 + 3 - 1 tuning runs, 3 final ones, of which the one with the tuning seed is a tuning run
    assert adamw.total_tokens == (4 + 3 - 1 + 3 - 1) * 1048576


def test_trial_configs_differ_in_nothing_but_the_optimizer(config, tmp_path: Path) -> None:
    raws = train_configs(config)
    adamw, muon = (
        trial_config(raws[arm.name], arm.lr_sweep()[0], tmp_path, "x").model_dump() for arm in plan_arms(config)
    )
    assert (adamw["optim"]["kind"], muon["optim"]["kind"]) == ("adamw", "muon")
    assert {key for key in adamw if adamw[key] != muon[key]} == {"name", "run_dir", "optim"}
    assert adamw["optim"]["lr"] == 5e-4
    assert adamw["optim"]["aux"] | {"lr": 0} == muon["optim"]["aux"] | {"lr": 0}


def test_unequal_grids_are_refused_with_the_reason(config) -> None:
    arms = [config.arms[0].model_copy(update={"lr": [1e-3, 2e-3]}), config.arms[1]]
    with pytest.raises(UserError, match=r"adamw has 2, muon has 4.*same number of tuning runs"):
        plan_arms(config.model_copy(update={"arms": arms}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loop.batch_size": 32}, "may change optim"),
        ({"data": {"seq_len": 64}}, r"may change optim.*data\.seq_len"),
        ({"optim.lr": 1e-3}, r"optim\.lr is decided"),
        ({"optim": {"aux": {"beta2": 0.99}}}, r"optim\.aux\.beta2 = 0\.99.*same optimizer"),
    ],
)
def test_arms_may_differ_in_their_optimizer_only(config, changed: dict, message: str) -> None:
    arms = [config.arms[0], config.arms[1].model_copy(update={"set": {"optim.kind": "muon"} | changed})]
    with pytest.raises(UserError, match=message):
        train_configs(config.model_copy(update={"arms": arms}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"optim.overrides": [{"roles": ["head"], "lr": 1e-3}]},
            r"arm muon: optim\.overrides set other learning rates",
        ),
        ({"optim.overrides": [{"names": ["*"], "weight_decay": 0.5}]}, r"optim\.overrides set other learning rates"),
        ({"optim.non_finite": "skip"}, r"arm muon: optim\.non_finite = skip \(adamw: raise\)"),
    ],
)
def test_what_no_arm_may_have_to_itself(config, changed: dict, message: str) -> None:
    arms = [config.arms[0], config.arms[1].model_copy(update={"set": {"optim.kind": "muon"} | changed})]
    with pytest.raises(UserError, match=message):
        train_configs(config.model_copy(update={"arms": arms}))
    train_configs(config.model_copy(update={"set": changed}))


def test_an_arm_may_say_what_muon_takes(config) -> None:
    changed = {"optim.kind": "muon", "optim.overrides": [{"names": ["*.q_proj.weight"], "rule": "adamw"}]}
    arms = [config.arms[0], config.arms[1].model_copy(update={"set": changed})]
    raws = train_configs(config.model_copy(update={"arms": arms}))
    assert "overrides" not in raws["adamw"]["optim"]
    assert raws["muon"]["optim"]["overrides"] == changed["optim.overrides"]


def test_a_branch_is_no_beginning_of_a_comparison(config) -> None:
    config = config.model_copy(update={"set": {**config.set, "branch_from": "runs/other"}})
    with pytest.raises(UserError, match="branch_from in a comparison"):
        train_configs(config)


def test_unsorted_grids_are_refused(config) -> None:
    arms = [config.arms[0], config.arms[1].model_copy(update={"aux_lr": [6.4e-2, 3.2e-2, 1.6e-2]})]
    with pytest.raises(UserError, match=r"aux_lr .* is not ascending"):
        plan_arms(config.model_copy(update={"arms": arms}))


def test_an_arm_whose_whole_lr_sweep_diverged_is_an_error(config) -> None:
    muon = plan_arms(config)[1]
    with pytest.raises(UserError, match="arm muon: every run of the lr sweep diverged"):
        muon.check_not_failed({t.point: float("inf") for t in muon.lr_sweep()})


def test_a_huge_rate_makes_a_name_that_a_run_may_have(config, tmp_path: Path) -> None:
    trial = Trial("muon", "tune", 1048576, 0, 1e30, 2e12)
    train = trial_config(train_configs(config)["muon"], trial, tmp_path, "x")
    assert train.name == "x-muon-tune-b1048576-s0-lr1e30-aux2e12"
    assert train.resolved_run_dir.endswith("/tune-b1048576-s0-lr1e30-aux2e12")
    assert train.optim.lr == 1e30


def test_a_tuning_budget_below_one_batch_is_reported_at_its_key(synthetic: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tune\.budget_tokens = 2047 is less than one batch \(2048 tokens\)"):
        compare(synthetic.make_config(tmp_path, tune={"budget_tokens": 2047}))
    assert not (tmp_path / "out").exists()
