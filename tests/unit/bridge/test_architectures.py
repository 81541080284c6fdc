"""The [model] table and config.json say the same; what one side cannot compute is refused with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from muonlm.bridge.architectures import from_hf_config, read_hf_config, to_hf_config
from muonlm.config.errors import UserError
from muonlm.config.model import GPTConfig, MoEConfig

# Fields that change which function the model computes: each is in config.json, or refused where it cannot be.
EXPRESSED = {
    "kind", "vocab_size", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
    "rope_theta", "max_seq_len", "rms_norm_eps", "tie_embeddings", "activation", "gated", "logit_softcap",
    "num_experts", "experts_per_token", "expert_size", "num_shared_experts", "num_dense_layers", "router",
    "normalize_weights", "routed_scale",
}  # fmt: skip
# Fields that matter for training alone.
OF_TRAINING = {
    "init_std", "base_width", "document_masking", "attention", "balance", "bias_rate", "balance_coefficient", "experts",
}  # fmt: skip


def model(table: dict[str, Any]) -> GPTConfig:
    return (MoEConfig if table.get("kind") == "moe" else GPTConfig).model_validate(table)


def test_every_option_of_a_model_is_decided() -> None:
    """A new option must be mapped, refused or found to matter for training alone before a model with it is exported."""
    assert GPTConfig.model_fields.keys() | MoEConfig.model_fields.keys() == EXPRESSED | OF_TRAINING


def test_round_trip(raw_model: dict[str, Any]) -> None:
    config = model(raw_model)
    back = from_hf_config(json.loads(json.dumps(to_hf_config(config, 600))), "here")
    resolved = {"num_kv_heads": config.resolved_kv_heads, "head_dim": config.resolved_head_dim, "vocab_size": 600}
    assert back.model_dump() == {**config.model_dump(), **resolved}


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"gated": False}, ["model.gated"]),
        ({"logit_softcap": 30.0, "gated": False}, ["model.gated", "model.logit_softcap = 30.0"]),
        ({"kind": "moe", "router": "softmax", "balance": "none"}, ["model.num_shared_experts = 1"]),
        (
            {"kind": "moe", "router": "softmax", "balance": "none", "num_shared_experts": 0, "routed_scale": 2.0},
            ["model.routed_scale = 2.0"],
        ),
        ({"kind": "moe", "logit_softcap": 5.0}, ["model.logit_softcap"]),
    ],
)
def test_what_no_architecture_expresses_is_named(table: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        to_hf_config(model(table), 100)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(named)
    assert all(text in line for text, line in zip(named, lines, strict=True))


@pytest.mark.parametrize(
    ("table", "change", "named"),
    [
        ({}, {"attention_bias": True}, "attention_bias"),
        ({}, {"hidden_act": "gelu"}, "hidden_act"),
        ({}, {"use_sliding_window": True}, "use_sliding_window"),
        ({}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_parameters"),
        ({}, {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_parameters"),
        ({}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({}, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({}, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"kind": "moe"}, {"scoring_func": "softmax"}, "scoring_func"),
        ({"kind": "moe"}, {"use_qk_norm": False}, "use_qk_norm"),
        ({"kind": "moe"}, {"n_group": 2}, "n_group"),
        ({"kind": "moe"}, {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor"),
        (
            {"kind": "moe", "router": "softmax", "balance": "none", "num_shared_experts": 0},
            {"mlp_only_layers": [1]},
            "mlp_only_layers",
        ),
    ],
)
def test_what_is_not_computed_here_is_named(table: dict[str, Any], change: dict[str, Any], named: str) -> None:
    hf = to_hf_config(model(table), 100) | change
    with pytest.raises(UserError, match=named):
        from_hf_config(hf, "here")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": "default"},
        {"vocab_size": None},
        {"num_key_value_heads": None},
        {"num_attention_heads": 0, "head_dim": None},
        {"num_attention_heads": "4", "head_dim": None},
        {"mlp_only_layers": 3},
        {"hidden_size": []},
    ],
)
@pytest.mark.parametrize("kind", ["gpt", "moe"])
def test_values_of_another_type_are_refused(kind: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        from_hf_config(to_hf_config(model({"kind": kind}), 100) | change, "here")


def test_configuration_of_the_hub_is_read() -> None:
    """The keys of Qwen/Qwen3-0.6B, as transformers 4 wrote them: no rope_parameters."""
    hf = {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    config = from_hf_config(hf, "here")
    assert (config.rope_theta, config.num_kv_heads, config.head_dim, config.max_seq_len) == (1e6, 8, 128, 40960)
    assert config.tie_embeddings


def test_directories_without_a_known_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ["qwen3"]}')
    with pytest.raises(UserError, match="model_type is"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama'"):
        read_hf_config(tmp_path)
    hf = to_hf_config(model({}), 100)
    del hf["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UserError, match="has no 'num_key_value_heads'"):
        from_hf_config(read_hf_config(tmp_path), tmp_path)
