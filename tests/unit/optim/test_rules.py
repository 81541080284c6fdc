"""Rules: by module type and role, failing closed."""

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.config.schema import AdamWConfig, AuxConfig, MuonConfig
from muonlm.optim.build import build_optimizer
from muonlm.optim.rules import assign_rules, parameter_roles, rules_table


class Tiny(nn.Module):
    """Names chosen to mislead anything that reads names: the table is called `linear`, a layer `embed_head_norm`."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.linear = nn.Embedding(11, 8)
        self.embed_head_norm = nn.Linear(8, 8)
        self.scale = nn.LayerNorm(8)
        self.wv = nn.Linear(8, 11, bias=False)
        if tied:
            self.wv.weight = self.linear.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.wv


def test_roles_ignore_names():
    assert parameter_roles(Tiny()) == {
        "linear.weight": "embedding",
        "embed_head_norm.weight": "hidden",
        "embed_head_norm.bias": "bias",
        "scale.weight": "norm",
        "scale.bias": "bias",
        "wv.weight": "head",
    }


def test_tied_table_is_an_embedding_once():
    roles = parameter_roles(Tiny(tied=True))
    assert roles["linear.weight"] == "embedding"
    assert "wv.weight" not in roles
    assert [r.rule for r in assign_rules(Tiny(tied=True), MuonConfig()) if r.name == "linear.weight"] == ["adamw"]


def test_unknown_parameter_is_an_error_that_names_it():
    class Odd(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 4)
            self.raw = nn.Parameter(torch.ones(2, 3))

    with pytest.raises(UserError, match=r"(?s)\.raw \(2, 3\) in .*Odd.*conv\.weight \(3, 2, 4\)"):
        parameter_roles(Odd())


def test_only_hidden_matrices_get_muon():
    config = MuonConfig(lr=0.5, weight_decay=0.3, aux=AuxConfig(lr=0.25, weight_decay=0.125))
    rules = {rule.name: rule for rule in assign_rules(Tiny(), config)}
    assert [name for name, rule in rules.items() if rule.rule == "muon"] == ["embed_head_norm.weight"]
    assert (rules["embed_head_norm.weight"].lr, rules["embed_head_norm.weight"].weight_decay) == (0.5, 0.3)
    assert (rules["wv.weight"].lr, rules["wv.weight"].weight_decay) == (0.25, 0.125)
    assert rules["scale.weight"].weight_decay == 0
    table = rules_table(list(rules.values()))
    assert "embed_head_norm.weight" in table
    assert "group hidden: 1 parameters, 64 elements, muon" in table


@pytest.mark.parametrize("config", [MuonConfig(), AdamWConfig(lr=0.5, beta2=0.9)])
def test_optimizer_groups_cover_every_parameter_once(config):
    model = Tiny()
    optimizer = build_optimizer(model, config, iterate_dtype=torch.float32)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert set(by_name) == {"embedding", "hidden", "norm", "head"}
    assert by_name["hidden"]["base_lr"] == by_name["hidden"]["lr"] == config.lr
    assert by_name["head"]["lr"] == config.aux.lr
    assert by_name["norm"]["weight_decay"] == 0
    if config.kind == "adamw":
        assert by_name["hidden"]["betas"] == (0.9, 0.9)
        assert by_name["head"]["betas"] == (0.9, 0.95)


def test_model_without_hidden_matrix():
    with pytest.raises(UserError, match="no hidden matrix"):
        assign_rules(nn.Embedding(3, 4), MuonConfig())
