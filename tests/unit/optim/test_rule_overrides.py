"""Overrides: what they select, what they change, and what is refused; the groups and the table that come of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.config.load import dump_toml, load_train, validate
from muonlm.config.schema import AdamWConfig, GPTConfig, MuonConfig, TrainConfig
from muonlm.model.build import build_model
from muonlm.optim.build import build_optimizer
from muonlm.optim.pieces import Split
from muonlm.optim.rules import ParamRule, assign_rules, groups_of
from muonlm.optim.rules_table import rules_summary, rules_table, split_text
from muonlm.optim.schedules import set_learning_rates

GPT = GPTConfig(num_layers=2, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1)
QUERY_KEY = ["*.self_attn.q_proj.weight", "*.self_attn.k_proj.weight"]


def muon(*overrides: dict, **options: object) -> MuonConfig:
    return MuonConfig.model_validate({"kind": "muon", **options, "overrides": list(overrides)})


def rules_of(config: MuonConfig | AdamWConfig, model: nn.Module | None = None) -> dict[str, ParamRule]:
    return {rule.name: rule for rule in assign_rules(model or build_model(GPT, 32, 0), config)}


def test_muon_on_value_output_and_feed_forward_only():
    config = muon({"names": QUERY_KEY, "rule": "adamw", "lr": 0.25})
    rules = rules_of(config)
    under_muon = {name.split(".", 3)[3] for name, rule in rules.items() if rule.rule == "muon"}
    assert under_muon == {
        *("self_attn.v_proj.weight", "self_attn.o_proj.weight"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    query = rules["model.layers.1.self_attn.q_proj.weight"]
    assert (query.role, query.rule, query.group, query.lr, query.weight_decay) == (
        "hidden",
        "adamw",
        "hidden.1",
        0.25,
        0,
    )
    assert (query.betas, query.eps) == ((config.aux.beta1, config.aux.beta2), config.aux.eps)
    assert rules["model.layers.0.mlp.up_proj.weight"].group == "hidden"


def test_the_config_that_comes_along_says_the_same():
    config = load_train("smoke-vo-ffn")
    assert config.optim.overrides[0].names == QUERY_KEY
    groups = {rule.group: rule.rule for rule in rules_of(config.optim).values()}
    assert groups == {"embedding": "adamw", "hidden": "muon", "query_key": "adamw", "norm": "adamw", "head": "adamw"}
    assert load_train("smoke-vo-ffn", ["optim.kind=adamw"]).optim.overrides == config.optim.overrides


def test_all_selectors_given_must_match():
    rules = rules_of(
        muon(
            {"roles": ["hidden"], "names": ["*.0.*"], "modules": ["Linear"], "lr": 0.5},
            {"roles": ["norm"], "modules": ["Linear", "RMSNorm"], "names": ["model.norm.*"], "weight_decay": 0.75},
        )
    )
    assert {name for name, rule in rules.items() if rule.lr == 0.5} == {
        name for name, rule in rules.items() if rule.role == "hidden" and ".0." in name
    }
    assert [name for name, rule in rules.items() if rule.weight_decay == 0.75] == ["model.norm.weight"]


def test_a_module_class_selects_and_so_does_its_base():
    rules = rules_of(muon({"modules": ["RMSNorm"], "lr": 0.5}))
    assert {rule.role for rule in rules.values() if rule.lr == 0.5} == {"norm"}

    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert [rule.lr for rule in rules_of(muon({"modules": ["Special"], "lr": 0.5}), model).values()] == [0.5, 4e-3]
    assert [rule.lr for rule in rules_of(muon({"modules": ["Linear"], "lr": 0.5}), model).values()] == [0.5, 0.5]


def test_a_tied_weight_answers_to_all_its_names():
    model = build_model(GPT.model_copy(update={"tie_embeddings": True}), 32, 0)
    rules = rules_of(muon({"names": ["lm_head.weight"], "lr": 0.5}), model)
    assert (rules["model.embed_tokens.weight"].role, rules["model.embed_tokens.weight"].lr) == ("embedding", 0.5)
    assert "lm_head.weight" not in rules


def test_overrides_under_adamw():
    config = AdamWConfig.model_validate({"kind": "adamw", "overrides": [{"names": QUERY_KEY, "lr": 0.5}]})
    rules = rules_of(config)
    query = rules["model.layers.0.self_attn.q_proj.weight"]
    assert (query.rule, query.lr, query.weight_decay) == ("adamw", 0.5, config.weight_decay)
    assert rules["model.layers.0.self_attn.v_proj.weight"].lr == config.lr


def test_the_head_under_muon_follows_the_hidden_matrices():
    config = muon({"roles": ["head"], "rule": "muon", "scaling": "jordan"})
    head = rules_of(config)["lm_head.weight"]
    assert (head.rule, head.lr, head.weight_decay, head.scaling) == ("muon", config.lr, config.weight_decay, "jordan")
    assert head.betas is None


def test_overrides_that_select_nothing_or_twice_are_listed():
    config = muon(
        {"names": ["q_proj"], "lr": 0.5},
        {"roles": ["hidden"], "lr": 0.5},
        {"names": ["*.1.mlp.up_proj.weight"], "weight_decay": 0.5},
        {"roles": ["experts"], "lr": 0.5},
    )
    with pytest.raises(UserError) as caught:
        rules_of(config)
    message = str(caught.value)
    assert "optim.overrides[0] selects no trainable parameter: names = ['q_proj']\n" in message
    assert "optim.overrides[3] selects no trainable parameter: roles = ['experts']\n" in message
    assert "model.layers.1.mlp.up_proj.weight is selected by optim.overrides[1] and optim.overrides[2]\n" in message
    assert message.count("selected by") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"names": ["*norm.weight"], "rule": "muon"}, r"model\.norm\.weight \(16,\) is a vector, which Muon cannot"),
        ({"roles": ["embedding"], "rule": "muon"}, r"embed_tokens\.weight \(32, 16\) is an embedding table"),
        ({"roles": ["hidden"], "rule": "adamw"}, "leave nothing for Muon; for AdamW alone set optim.kind=adamw"),
        (
            {"names": QUERY_KEY, "split": {"sizes": [8, 7]}},
            r"(?s)cannot be under Muon as asked for:\n.*0\.self_attn\.q_proj\.weight: a split .* covers 15 of the 16.*"
            r"1\.self_attn\.k_proj\.weight: a split .* covers 15 of the 8 rows",
        ),
        ({"names": QUERY_KEY, "split": {"sizes": [8, 7], "dim": 1}}, "covers 15 of the 16 columns"),
        (
            {"roles": ["norm"], "scaling": "jordan"},
            r"under Muon only.*\n  optim\.overrides\[0\] \(roles = \['norm'\]\)",
        ),
    ],
)
def test_what_cannot_be(override: dict, message: str):
    with pytest.raises(UserError, match=message):
        rules_of(muon(override))


def test_an_unknown_parameter_needs_a_rule_not_just_a_setting():
    model = nn.Sequential(nn.Linear(4, 4))
    model.raw = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(UserError, match=r"raw \(2, 3\)"):
        rules_of(muon({"names": ["raw"], "lr": 0.5}), model)
    assert rules_of(muon({"names": ["raw"], "rule": "adamw"}), model)["raw"].rule == "adamw"
    raw = rules_of(muon({"names": ["raw"], "rule": "muon"}), model)["raw"]
    assert (raw.rule, raw.role, raw.group) == ("muon", None, "other")


def test_groups_have_one_setting_each_and_keep_their_base_rate():
    config = muon(
        {"names": ["*.q_proj.weight"], "lr": 0.5, "split": {"sizes": [8], "groups": 2, "separate_groups": True}},
        {"names": ["*.k_proj.weight", "*.v_proj.weight"], "lr": 0.25},
        {"names": ["*.o_proj.weight"], "group": "out", "split": {"sizes": [8, 8], "dim": 1}},
        {"roles": ["norm"], "group": "hidden.1", "lr": 0.125},
    )
    model = build_model(GPT, 32, 0)
    optimizer = build_optimizer(model, config, iterate_dtype=torch.float32)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert len(groups) == len(optimizer.param_groups) == 7
    names = {name: {n.split(".")[-2] for n in group["param_names"]} for name, group in groups.items()}
    assert names["hidden"] == {"gate_proj", "up_proj", "down_proj"}, "what no override touches keeps the bare name"
    assert names["hidden.2"] == {"q_proj"}, "hidden.1 is taken"
    assert names["hidden.3"] == {"k_proj", "v_proj"}
    assert names["out"] == {"o_proj"}
    set_learning_rates(optimizer, 0.5)
    rates = {name: (group["base_lr"], group["lr"]) for name, group in groups.items()}
    assert rates["hidden.2"] == (0.5, 0.25)
    assert rates["hidden.3"] == (0.25, 0.125)
    assert rates["hidden"] == (config.lr, config.lr / 2)
    assert groups["out"]["split"] == Split((8, 8), dim=1)
    labels = [piece.label for piece in optimizer.plan().pieces]
    assert len(labels) == 2 * (2 + 1 + 1 + 2 + 3)
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(parameters) == sorted(id(p) for p in model.parameters())


def test_options_reach_the_optimizer():
    config = muon(
        momentum_form="sum",
        momentum_dtype="bfloat16",
        cautious=True,
        non_finite="skip",
        exchange={"bucket_bytes": 4096, "depth": 2, "split_min_flops": 7},
    )
    optimizer = build_optimizer(build_model(GPT, 32, 0), config, iterate_dtype=torch.float32)
    group = next(group for group in optimizer.param_groups if group["rule"] == "muon")
    assert (group["momentum_form"], group["cautious"]) == ("sum", True)
    assert optimizer.state[group["params"][0]]["momentum_buffer"].dtype == torch.bfloat16
    assert optimizer.non_finite == "skip"
    assert optimizer.plan().num_rounds > 1, "a bucket of 4 KiB holds few matrices"
    assert optimizer._depth == 2
    assert optimizer._plan_options["split_min_flops"] == 7
    adamw = AdamWConfig.model_validate({"kind": "adamw", "non_finite": "skip"})
    assert build_optimizer(build_model(GPT, 32, 0), adamw).non_finite == "skip"


def test_defaults_are_those_of_the_optimizer():
    """The schema imports no torch, so that it repeats them."""
    built = build_optimizer(build_model(GPT, 32, 0), MuonConfig(), iterate_dtype=torch.bfloat16)
    plain = type(built)([nn.Parameter(torch.ones(2, 2))])
    assert built.defaults == plain.defaults
    for name in ("_plan_options", "_depth", "_momentum_dtype", "non_finite", "_steps", "_coefficients"):
        assert getattr(built, name) == getattr(plain, name), name


def test_the_table_lists_everything_and_then_the_plan():
    model = build_model(GPT, 32, 0)
    config = muon({"names": ["*.q_proj.weight"], "lr": 0.5, "split": {"sizes": [8, 8]}})
    rules = assign_rules(model, config)
    optimizer = build_optimizer(model, config, iterate_dtype=torch.float32, rules=rules)
    lines = rules_table(rules, optimizer.plan()).splitlines()
    assert lines[0].split() == ["parameter", "shape", "role", "rule", "group", "lr", "decay", "split"]
    row = next(line for line in lines if line.startswith("model.layers.0.self_attn.q_proj.weight "))
    assert row.split()[1:] == ["16x16", "hidden", "muon", "hidden.1", "0.5", "0.1", "8+8"]
    total = sum(p.numel() for p in model.parameters())
    (line,) = [line for line in lines if line.startswith("total: ")]
    assert line.startswith(f"total: {len(rules)} parameters, {total:,} elements; muon 14 parameters, ")
    plan = lines[lines.index("") + 1 :]
    assert plan[0].startswith("exchange plan: 16 matrices on 1 rank in 1 round; ")
    assert plan[1:] == optimizer.plan().lines()
    assert "exchange plan" not in rules_table(
        assign_rules(model, AdamWConfig()), build_optimizer(model, AdamWConfig()).plan()
    )


def test_the_summary_has_a_line_a_group_and_no_other_line_a_parameter():
    model = build_model(GPT, 32, 0)
    config = muon({"names": ["*.q_proj.weight"], "lr": 0.5, "weight_decay": 0.25})
    rules = assign_rules(model, config)
    table = rules_table(rules, build_optimizer(model, config, iterate_dtype=torch.float32, rules=rules).plan())
    *groups, total, plan = rules_summary(table).splitlines()
    assert [line.partition(":")[0] for line in groups] == [f"group {rule}" for rule in groups_of(rules)]
    (line,) = [line for line in groups if line.startswith("group hidden.1: ")]
    members = [rule for rule in rules if rule.group == "hidden.1"]
    assert (
        line
        == f"group hidden.1: {len(members)} parameters, {16 * 16 * len(members):,} elements, muon, lr 0.5, decay 0.25"
    )
    assert total.startswith(f"total: {len(rules)} parameters, ")
    assert plan.startswith("exchange plan: 14 matrices on 1 rank in 1 round; ")


@pytest.mark.parametrize(
    ("split", "text"),
    [
        (None, "-"),
        (Split((64, 32, 32)), "64+32+32"),
        (Split((16, 8, 8), groups=4), "4x(16+8+8)"),
        (Split((16,), groups=4, separate_groups=True, dim=1), "4x(16) each of columns"),
    ],
)
def test_a_split_in_a_word(split: Split | None, text: str):
    assert split_text(split) == text


def test_overrides_survive_toml():
    raw = {
        "name": "x",
        "data": {"path": "x"},
        "loop": {"steps": 30},
        "optim": {"overrides": [{"modules": ["Linear"], "split": {"sizes": [1, 2]}}, {"roles": ["head"], "lr": 1.0}]},
    }
    config = validate(TrainConfig, raw, "test")
    import tomllib

    assert validate(TrainConfig, tomllib.loads(dump_toml(config)), "test") == config
