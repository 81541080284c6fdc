"""Learning rates and initial values over width: the factors of each role, and what a step then moves."""

import math

import pytest

from muonlm.bench.coordinates import coordinate_changes, growth
from muonlm.config.model import GPTConfig
from muonlm.config.optim import AdamWConfig, AuxConfig, MuonConfig, OverrideConfig, Role, ScalingName
from muonlm.model.build import build_model
from muonlm.model.transfer import std_factor
from muonlm.optim.build import build_optimizer
from muonlm.optim.rules import ParamRule, assign_rules
from muonlm.optim.scaling import update_scale
from muonlm.optim.transfer import lr_factor, transferred

WIDE = GPTConfig(num_layers=1, hidden_size=64, intermediate_size=96, num_heads=8, head_dim=8, base_width=16)


def adamw_rule(role: Role, shape: tuple[int, ...] = (8, 8)) -> ParamRule:
    return ParamRule("w", shape, math.prod(shape), role, "adamw", role, lr=1.0, weight_decay=0.5)


def muon_rule(scaling: ScalingName, role: Role = "hidden", shape: tuple[int, ...] = (8, 8)) -> ParamRule:
    return ParamRule("w", shape, math.prod(shape), role, "muon", role, lr=1.0, weight_decay=0.5, scaling=scaling)


@pytest.mark.parametrize(
    ("role", "factor"),
    [("hidden", 0.25), ("experts", 0.25), ("head", 0.25), ("router", 0.25), ("embedding", 1), ("norm", 1), ("bias", 1)],
)
def test_learning_rates_of_adamw(role: Role, factor: float):
    (rule,) = transferred([adamw_rule(role)], 4.0)
    assert rule.lr == factor
    assert rule.lr * rule.weight_decay == 0.5, "what is forgotten in a step stays"


@pytest.mark.parametrize(("scaling", "factor"), [("spectral", 1), ("jordan", 1), ("rms_adamw", 0.5)])
def test_learning_rates_of_muon(scaling: ScalingName, factor: float):
    assert lr_factor(muon_rule(scaling), 4.0) == factor
    assert lr_factor(muon_rule(scaling, "experts", (6, 32, 8)), 4.0) == factor


@pytest.mark.parametrize("scaling", ["spectral", "jordan", "rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 64), (512, 64)])
def test_the_norm_of_a_muon_step_on_an_output_follows_its_shape(scaling: ScalingName, shape: tuple[int, int]):
    """The output is as wide at base width: the operator norm of lr * scale * orthogonal must fall as 1 / sqrt(in)."""
    at_base = update_scale(scaling, shape[0], shape[1] // 4)
    wide = update_scale(scaling, *shape) * lr_factor(muon_rule(scaling, "router", shape), 4.0)
    assert wide / at_base == pytest.approx(0.5)


def test_nothing_changes_at_base_width():
    config = MuonConfig(scaling="rms_adamw")
    model = build_model(WIDE.model_copy(update={"base_width": 64}), 32, 0)
    rules = assign_rules(model, config)
    assert transferred(rules, model.config.width_ratio) == rules
    assert all(std_factor(model.config, name) == 1 for name, _ in model.named_parameters())


def test_a_group_whose_parameters_come_to_differ_is_divided():
    """Two roles in one group: the factor of one must not reach the other."""
    config = AdamWConfig(overrides=[OverrideConfig(roles=["embedding", "head"], group="tables", lr=1.0)])
    optimizer = build_optimizer(build_model(WIDE, 32, 0), config, width_ratio=WIDE.width_ratio)
    rates = {group["name"]: group["base_lr"] for group in optimizer.param_groups}
    assert (rates["tables.embedding"], rates["tables.head"]) == (1.0, 0.25)


def test_an_optimizer_made_without_rules_transfers():
    config = AdamWConfig(lr=0.5, aux=AuxConfig(lr=0.125))
    optimizer = build_optimizer(build_model(WIDE, 32, 0), config, width_ratio=WIDE.width_ratio)
    rates = {group["name"]: group["base_lr"] for group in optimizer.param_groups}
    assert rates == {"embedding": 0.125, "hidden": 0.125, "norm": 0.125, "head": 0.03125}


def test_initial_values():
    names = {
        "model.embed_tokens.weight": 1,
        "lm_head.weight": 1 / 4,
        "model.layers.0.mlp.gate.weight": 1 / 4,
        "model.layers.0.mlp.gate_proj.weight": 1 / 2,
        "model.layers.0.self_attn.o_proj.weight": 1 / 2,
        "model.layers.0.mlp.experts.down_proj": 1 / 2,
    }
    assert {name: std_factor(WIDE, name) for name in names} == names


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tie_embeddings": True}, "tie_embeddings = false"), ({"head_dim": None}, "needs head_dim, the same as at")],
)
def test_what_cannot_transfer_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GPTConfig.model_validate(WIDE.model_dump() | change)
    GPTConfig.model_validate(WIDE.model_dump() | change | {"base_width": None})


WIDTHS = (64, 128, 256, 512)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_step_moves_as_far_at_every_width(kind: str):
    """Over eight times the width: within a factor of 1.8 with base_width; without it the logits alone grow by 4."""

    def measured(base_width: int | None) -> dict[str, list[float]]:
        changes = [coordinate_changes(width, kind, base_width, steps=4) for width in WIDTHS]
        return {place: [change[place] for change in changes] for place in changes[0]}

    for place, values in measured(64).items():
        assert max(values) / min(values) < 1.8, (place, values)
        assert abs(growth(WIDTHS, values)) < 0.2, (place, values)
    untransferred = measured(None)
    for place, values in untransferred.items():
        assert growth(WIDTHS, values) > 0.4, (place, values)
    assert untransferred["logits"][-1] / untransferred["logits"][0] > 4


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_step_moves_as_far_at_twice_the_width(kind: str):
    """The quick form of the check above: four times the width."""
    with_base, without = ([coordinate_changes(w, kind, b, steps=2) for w in (32, 128)] for b in (32, None))
    for place in with_base[0]:
        assert abs(growth((32, 128), [change[place] for change in with_base])) < 0.35, place
    assert growth((32, 128), [change["logits"] for change in without]) > 0.5


def test_growth_is_the_exponent():
    assert growth([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
