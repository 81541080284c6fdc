"""A `[model]` table as the config.json of a transformers architecture, and back. Imports no torch, no transformers.

| model | architecture |
|---|---|
| `gpt` | Qwen3ForCausalLM |
| `moe`, router `sigmoid` | Glm4MoeForCausalLM with QK-norm and rotation of the whole head |
| `moe`, router `softmax` | Qwen3MoeForCausalLM |

All three are decoders with the same attention; their parameters have the names of this package's (see `tensors`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from muonlm.config.errors import UserError
from muonlm.config.model import GPTConfig, MoEConfig

CONFIG_NAME = "config.json"
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}


def to_hf_config(config: GPTConfig, vocab_size: int, dtype: str = "float32") -> dict[str, Any]:
    """Content of config.json of the architecture with the same parameters and mathematics.

    `dtype` is that of the stored weights. Raises UserError that names every option that no architecture expresses.
    """
    if problems := _not_expressed(config):
        raise UserError(
            "no architecture of transformers computes what this model does, so that it cannot be exported:\n  "
            + "\n  ".join(problems)
        )
    kind = "qwen3" if not isinstance(config, MoEConfig) else "glm4_moe" if config.router == "sigmoid" else "qwen3_moe"
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.resolved_kv_heads,
        "head_dim": config.resolved_head_dim,
        "hidden_act": config.activation,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "attention_bias": False,
        "attention_dropout": 0.0,
        # Both spellings: transformers before 5 and other engines read the first, newer releases the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **_of_kind(config, kind),
    }


def _of_kind(config: GPTConfig, kind: str) -> dict[str, Any]:
    if not isinstance(config, MoEConfig):
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    shared: dict[str, Any] = {
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.normalize_weights,
    }
    if kind == "qwen3_moe":
        return shared | {
            "num_experts": config.num_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(config.num_dense_layers)),
            "router_aux_loss_coef": config.balance_coefficient if config.balance == "loss" else 0.0,
            "output_router_logits": False,
            "use_sliding_window": False,
            "sliding_window": None,
        }
    return shared | {
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.num_shared_experts,
        "first_k_dense_replace": config.num_dense_layers,
        "routed_scaling_factor": config.routed_scale,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0
        },
    }  # fmt: skip


def _not_expressed(config: GPTConfig) -> list[str]:
    """Options that no architecture has, each with the reason."""
    problems = []
    if not config.gated:
        problems.append(
            "model.gated = false: every architecture with QK-norm of this kind multiplies the activation by a second "
            "projection"
        )
    if config.logit_softcap is not None:
        problems.append(f"model.logit_softcap = {config.logit_softcap}: no architecture with this attention bounds it")
    if isinstance(config, MoEConfig) and config.router == "softmax":
        if config.num_shared_experts:
            problems.append(
                f'model.num_shared_experts = {config.num_shared_experts} with router = "softmax": Qwen3MoeForCausalLM '
                "has no shared experts; only the sigmoid router's Glm4MoeForCausalLM does"
            )
        if config.routed_scale != 1:
            problems.append(
                f'model.routed_scale = {config.routed_scale} with router = "softmax": Qwen3MoeForCausalLM has no such '
                "factor; only the sigmoid router's Glm4MoeForCausalLM does"
            )
    return problems


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Content of config.json in `directory`. Raises UserError where there is none, or of no known architecture."""
    path = Path(directory) / CONFIG_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no {CONFIG_NAME}; give a directory as written by `muonlm export` or downloaded from the "
            "hub (huggingface-cli download NAME --local-dir DIR)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; download or export it again") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f"{path}: model_type is {kind!r}; models that can be read are {', '.join(ARCHITECTURES)}: those whose "
            "mathematics muonlm has"
        )
    return dict(content)


def from_hf_config(hf: Mapping[str, Any], origin: str | Path) -> GPTConfig:
    """The model of a config.json that `read_hf_config` read from `origin`, with its `vocab_size` set.

    Raises UserError for a missing key, and for every value whose mathematics this package does not have.
    """
    kind = hf["model_type"]
    try:
        # Where both are given, transformers takes the scaling.
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        if problems := _not_understood(hf, rope):
            raise UserError(
                f"{origin}: this {ARCHITECTURES[kind]} computes what muonlm does not:\n  " + "\n  ".join(problems)
            )
        rope = {**(hf.get("rope_parameters") or {}), **rope}
        heads, size = hf["num_attention_heads"], hf["hidden_size"]
        table: dict[str, Any] = {
            "vocab_size": int(hf["vocab_size"]),
            "num_layers": hf["num_hidden_layers"],
            "hidden_size": size,
            "intermediate_size": hf["intermediate_size"],
            "num_heads": heads,
            "num_kv_heads": int(hf["num_key_value_heads"]),
            # What the architectures take where config.json does not say it.
            "head_dim": hf.get("head_dim") or (128 if kind == "qwen3" else size // heads),
            "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
            "max_seq_len": hf["max_position_embeddings"],
            "rms_norm_eps": hf["rms_norm_eps"],
            "tie_embeddings": hf.get("tie_word_embeddings", False),
            "init_std": hf.get("initializer_range", 0.02),
            "activation": hf["hidden_act"],
        }
        if kind == "qwen3":
            return GPTConfig(kind="gpt", **table)
        return MoEConfig(kind="moe", **table, **_experts_of(hf, kind))
    except KeyError as error:
        raise UserError(f"{origin}: config.json has no {error.args[0]!r}; download or export the model again") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{origin}: a value in config.json has another type than it should ({error}); download or export the model "
            "again"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{origin}: config.json describes no model: {where} {first['msg']}") from None


def _experts_of(hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
    table: dict[str, Any] = {
        "experts_per_token": hf["num_experts_per_tok"],
        "expert_size": hf["moe_intermediate_size"],
        "normalize_weights": hf["norm_topk_prob"],
    }
    if kind == "glm4_moe":
        return table | {
            "router": "sigmoid",
            "num_experts": hf["n_routed_experts"],
            "num_shared_experts": hf["n_shared_experts"],
            "num_dense_layers": hf["first_k_dense_replace"],
            "routed_scale": hf["routed_scaling_factor"],
        }
    coefficient = hf.get("router_aux_loss_coef", 0.0)
    return table | {
        "router": "softmax",
        "num_experts": hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        "num_shared_experts": 0,
        "num_dense_layers": len(hf.get("mlp_only_layers") or ()),
        **({"balance": "loss", "balance_coefficient": coefficient} if coefficient else {"balance": "none"}),
    }


def _not_understood(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> list[str]:
    """Values of config.json that this package does not compute, each as `key = value: reason`."""
    dense_layers = hf.get("mlp_only_layers") or []
    glm = hf["model_type"] == "glm4_moe"
    rotated = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5 if glm else 1.0))
    wrong = [
        ("hidden_act", hf.get("hidden_act") not in ("silu", "relu2"), "silu and relu2 are known"),
        ("attention_bias", bool(hf.get("attention_bias")), "projections have no biases here"),
        ("use_sliding_window", bool(hf.get("use_sliding_window")), "attention reaches the whole context here"),
        ("decoder_sparse_step", hf.get("decoder_sparse_step", 1) != 1, "all layers after the dense ones have experts"),
        ("mlp_only_layers", dense_layers != list(range(len(dense_layers))), "dense layers come first here"),
        ("use_qk_norm", glm and not hf.get("use_qk_norm", False), "queries and keys are normalised here"),
        ("scoring_func", hf.get("scoring_func") not in (None, "sigmoid" if glm else "softmax"), "another router"),
        ("final_logit_softcapping", bool(hf.get("final_logit_softcapping")), "logits are not capped there"),
        ("quantization_config", bool(hf.get("quantization_config")), "weights are read as they are"),
        ("layer_types", set(hf.get("layer_types") or ()) - {"full_attention"}, "attention reaches the whole context"),
        ("n_group", hf.get("n_group", 1) != 1, "experts are chosen among all, not within groups"),
    ]
    problems = [f"{key} = {json.dumps(hf.get(key))}: {reason}" for key, is_wrong, reason in wrong if is_wrong]
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        problems.append(f"rope_parameters = {json.dumps(dict(rope))}: rotary positions are not scaled here")
    if rotated != 1:
        problems.append(f"partial_rotary_factor = {rotated}: the whole head is rotated here")
    return problems
