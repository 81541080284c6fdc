"""Rules: by module type and role, failing closed."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.config.schema import AdamWConfig, AuxConfig, MuonConfig
from muonlm.optim.build import build_optimizer
from muonlm.optim.pieces import Split
from muonlm.optim.rules import assign_rules, parameter_roles
from muonlm.optim.rules_table import rules_table


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


def test_tied_table_is_an_embedding_once_in_any_order():
    model = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4)})
    model["head"].weight = model["table"].weight
    assert parameter_roles(model) == {"head.weight": "embedding"}


def test_tied_table_is_an_embedding_once():
    roles = parameter_roles(Tiny(tied=True))
    assert roles["linear.weight"] == "embedding"
    assert "wv.weight" not in roles
    assert [r.rule for r in assign_rules(Tiny(tied=True), MuonConfig()) if r.name == "linear.weight"] == ["adamw"]


def test_unknown_parameter_is_an_error_that_names_it():
    class Odd(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.ones(2, 3))
            self.lstm = nn.LSTM(2, 3)

    with pytest.raises(UserError, match=r"(?s)raw \(2, 3\) in .*Odd\n.*lstm\.weight_ih_l0 \(12, 2\) in .*LSTM\n"):
        parameter_roles(Odd())


def test_what_does_not_train_needs_no_rule():
    model = Tiny()
    model.raw = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    assert "raw" not in parameter_roles(model)


class LowRank(nn.Linear):
    """An adapter in the way of loralib: parameters of its own beside those of its base class."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.lora_A = nn.Parameter(torch.ones(2, 4))


class BaseTunerLayer:
    """Stands for the class of that name in peft."""


class Adapter(nn.Module, BaseTunerLayer):
    """An adapter in the way of peft: linear layers around a base layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.down = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})


def test_adapters_are_unknown_whatever_they_are_made_of():
    model = nn.ModuleDict({"a": LowRank(), "b": Adapter()})
    with pytest.raises(UserError, match=r"a\.lora_A \(2, 4\).*LowRank\n  b\.down\.default\.weight") as caught:
        parameter_roles(model)
    assert "base_layer" not in str(caught.value)


def test_convolutions():
    model = nn.ModuleDict(
        {
            "mixing": nn.Conv2d(4, 6, 3),
            "depthwise": nn.Conv1d(6, 6, 3, groups=6, bias=False),
            "up": nn.ConvTranspose1d(4, 6, 3, bias=False),
        }
    )
    config = MuonConfig(aux=AuxConfig(weight_decay=0.25))
    rules = {rule.name: rule for rule in assign_rules(model, config)}
    assert {name: (rule.role, rule.rule) for name, rule in rules.items()} == {
        "mixing.weight": ("convolution", "muon"),
        "mixing.bias": ("bias", "adamw"),
        "depthwise.weight": ("convolution", "adamw"),
        "up.weight": ("convolution", "adamw"),
    }
    assert (rules["depthwise.weight"].lr, rules["depthwise.weight"].weight_decay) == (config.aux.lr, 0.25)
    assert rules["depthwise.weight"].group != rules["mixing.weight"].group
    optimizer = build_optimizer(model, config, iterate_dtype=torch.float32)
    (piece,) = optimizer.plan().pieces
    assert (piece.rows, piece.cols) == (6, 4 * 9), "a kernel is one matrix, not a stack"
    adamw = {rule.name: rule for rule in assign_rules(model, AdamWConfig(lr=0.5))}
    assert (adamw["mixing.weight"].lr, adamw["depthwise.weight"].lr) == (0.5, 1.6e-2), "as in the other arm"


class TinyExperts(nn.Module):
    """As transformers keeps experts: gate and up fused, what `use_experts_implementation` says beside."""

    def __init__(self, *, transposed: bool = False, concatenated: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.has_gate, self.is_transposed, self.is_concatenated, self.has_bias = True, transposed, concatenated, bias
        up, down = ((3, 8, 12), (3, 6, 8)) if transposed else ((3, 12, 8), (3, 8, 6))
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(up)), nn.Parameter(torch.ones(down))
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.ones(3, 12))


class TinyTopkRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 8))
        self.inner = nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.experts = TinyExperts(**options)
        self.a = TinyTopkRouter()
        self.gate = nn.Linear(8, 3, bias=False)
        self.shared_gate = nn.Linear(8, 1, bias=False)
        self.latent = nn.Linear(8, 6, bias=False)


def test_routers_and_experts_as_in_transformers():
    rules = {rule.name: rule for rule in assign_rules(Block(bias=True), MuonConfig())}
    assert {name: (rule.role, rule.rule) for name, rule in rules.items()} == {
        "experts.gate_up_proj": ("experts", "muon"),
        "experts.gate_up_proj_bias": ("bias", "adamw"),
        "experts.down_proj": ("experts", "muon"),
        "a.weight": ("router", "adamw"),
        "a.inner.weight": ("router", "adamw"),
        "a.inner.bias": ("bias", "adamw"),
        "gate.weight": ("router", "adamw"),
        "shared_gate.weight": ("router", "adamw"),
        "latent.weight": ("hidden", "muon"),
    }
    pieces = build_optimizer(Block(), MuonConfig(), iterate_dtype=torch.float32).plan().pieces
    shapes = [(p.rows, p.cols) for p in pieces if p.label.startswith("experts.gate_up_proj")]
    assert shapes == [(6, 8)] * 6, "gate and up of three experts"


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ({}, Split((6, 6))),
        ({"transposed": True}, Split((6, 6), dim=1)),
        ({"concatenated": False}, None),
    ],
)
def test_gate_and_up_are_split_where_their_layout_is_certain(options: dict, split: Split | None):
    rules = {rule.name: rule for rule in assign_rules(Block(**options), MuonConfig())}
    assert rules["experts.gate_up_proj"].split == split
    assert rules["experts.down_proj"].split is None


def test_a_scaling_that_takes_in_for_out_is_refused():
    with pytest.raises(UserError, match=r"experts\.down_proj \(3, 6, 8\) is stored \(in, out\), and spectral would"):
        assign_rules(Block(transposed=True), MuonConfig(scaling="spectral"))
    assign_rules(Block(transposed=True), MuonConfig(scaling="rms_adamw"))
    assign_rules(Block(), MuonConfig(scaling="spectral"))


def test_attention_of_torch_is_split():
    rules = {rule.name: rule for rule in assign_rules(nn.MultiheadAttention(8, 2), MuonConfig())}
    assert rules["in_proj_weight"].split == Split((8, 8, 8))
    assert rules["out_proj.weight"].rule == "muon"
    assert rules["in_proj_bias"].role == "bias"


class Declared(nn.Module):
    parameter_roles: ClassVar[dict[str, str]] = {
        "raw": "hidden",
        "stack": "experts",
        "inner.weight": "head",
        "off": "norm",
    }

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.stack = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3, 4))
        self.inner = nn.Linear(3, 3)
        self.register_parameter("off", None)


def test_a_class_says_what_its_parameters_are():
    assert parameter_roles(nn.Sequential(Declared())) == {
        "0.raw": "hidden",
        "0.stack": "experts",
        "0.inner.weight": "head",
        "0.inner.bias": "bias",
    }

    class Outer(nn.Sequential):
        parameter_roles: ClassVar[dict[str, str]] = {"0.raw": "router"}

    assert parameter_roles(Outer(Declared()))["0.raw"] == "router"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"raw": "matrix"}, r"Wrong.parameter_roles: unknown role 'matrix' of 'raw'; roles are hidden"),
        ({"inner.wieght": "head"}, r"'inner\.wieght' is no parameter of the model"),
        ({"stack": "hidden"}, r"stack \(2, 3, 4\) is declared as hidden"),
    ],
)
def test_a_wrong_declaration_is_an_error(roles: dict[str, str], message: str):
    class Wrong(Declared):
        parameter_roles: ClassVar[dict[str, str]] = roles

    with pytest.raises(UserError, match=message):
        parameter_roles(Wrong())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_models_of_transformers(kind: str):
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[kind](num_hidden_layers=4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    rules = {rule.name: rule for rule in assign_rules(model, MuonConfig())}
    experts = rules["model.layers.3.mlp.experts.gate_up_proj"]
    assert (experts.role, experts.rule) == ("experts", "muon")
    assert experts.split == Split((experts.shape[1] // 2,) * 2)
    assert rules["model.layers.3.mlp.gate.weight"].role == "router"
    assert rules["lm_head.weight"].role == "head"
    assert rules["model.norm.weight"].role == "norm"


def test_only_hidden_matrices_get_muon():
    config = MuonConfig(lr=0.5, weight_decay=0.3, aux=AuxConfig(lr=0.25, weight_decay=0.125))
    rules = {rule.name: rule for rule in assign_rules(Tiny(), config)}
    assert [name for name, rule in rules.items() if rule.rule == "muon"] == ["embed_head_norm.weight"]
    assert (rules["embed_head_norm.weight"].lr, rules["embed_head_norm.weight"].weight_decay) == (0.5, 0.3)
    assert (rules["wv.weight"].lr, rules["wv.weight"].weight_decay) == (0.25, 0.125)
    assert rules["scale.weight"].weight_decay == 0
    table = rules_table(list(rules.values()))
    assert "embed_head_norm.weight" in table
    assert "group hidden: 1 parameter, 64 elements, muon, lr 0.5, decay 0.3\n" in table


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
