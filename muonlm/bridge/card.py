"""The model card of an export: what the run itself recorded, and how to load the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muonlm.config.model import MoEConfig
from muonlm.config.schema import MuonConfig, TrainConfig
from muonlm.data.manifest import Manifest
from muonlm.model.flops import count_parameters
from muonlm.track.metrics import read_metrics

Row = tuple[str, str]


@dataclass(frozen=True)
class Recorded:
    """What a run wrote down up to the step that is exported.

    `train` and `evaluation` are the last records of docs/metrics.md up to it, None where there is none; `environment`
    is environment.json, empty where it cannot be read.
    """

    step: int
    environment: Mapping[str, Any]
    train: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None


def read_recorded(run: Path, step: int) -> Recorded:
    """The records of the run in `run` up to `step`. Of two evaluations at one step, that of the end of a run counts."""
    records = [record for record in read_metrics(run) if record["step"] <= step]
    last = {record["kind"]: record for record in records if record["kind"] in ("train", "eval")}
    try:
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    return Recorded(step, environment, last.get("train"), last.get("eval"))


def model_card(config: TrainConfig, recorded: Recorded, manifest: Manifest, hf: Mapping[str, Any], dtype: str) -> str:
    """README.md: YAML front matter of the hub, tables of the run's numbers, and code that loads the model."""
    tables = [
        ("Model", _model_rows(config, hf, dtype)),
        ("Training", _training_rows(config, recorded)),
        ("Results", _result_rows(recorded)),
        ("Data", _data_rows(config, manifest)),
        ("Software", _software_rows(recorded)),
    ]
    body = "\n\n".join(f"## {title}\n\n{_table(rows)}" for title, rows in tables if rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [muonlm, {config.optim.kind}]
---

# {config.name}

A language model pretrained with muonlm: step {recorded.step:,} of {config.num_steps:,}.

{body}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
model = AutoModelForCausalLM.from_pretrained("DIRECTORY"{_loading_options(config)})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

The model was trained on sequences of {config.data.seq_len:,} tokens, and continues text; it was not taught to follow
instructions.
"""


def _loading_options(config: TrainConfig) -> str:
    """What `from_pretrained` needs besides: grouped products, its default for experts, take rows of whole 16 bytes."""
    model = config.model
    is_odd = isinstance(model, MoEConfig) and (model.hidden_size % 8 or model.expert_size % 8)
    return ', experts_implementation="eager"' if is_odd else ""


def _model_rows(config: TrainConfig, hf: Mapping[str, Any], dtype: str) -> list[Row]:
    model = config.model
    counts = count_parameters(model, hf["vocab_size"])
    rows = [
        ("architecture", hf["architectures"][0]),
        ("parameters", f"{counts['total']:,}"),
        ("of these in embedding and head", f"{counts['embedding'] + counts['head']:,}"),
        ("layers", str(model.num_layers)),
        ("hidden size", str(model.hidden_size)),
        ("heads (query / key and value)", f"{model.num_heads} / {model.resolved_kv_heads}"),
        ("head size", str(model.resolved_head_dim)),
        ("feed-forward size", str(model.intermediate_size)),
        ("activation", model.activation),
        ("embedding and head shared", "yes" if model.tie_embeddings else "no"),
        ("token ids", f"{hf['vocab_size']:,}"),
        ("dtype of the files", dtype),
    ]
    if isinstance(model, MoEConfig):
        rows[2:2] = [
            ("of these used by a token", f"{counts['active']:,}"),
            ("experts (routed / per token / shared)",
             f"{model.num_experts} / {model.experts_per_token} / {model.num_shared_experts}"),
            ("expert size", str(model.expert_size)),
            ("first layers without experts", str(model.num_dense_layers)),
            ("router", model.router),
        ]  # fmt: skip
    if model.document_masking:
        rows.append(("attention in training", "within documents"))
    return rows


def _training_rows(config: TrainConfig, recorded: Recorded) -> list[Row]:
    optim, schedule = config.optim, config.schedule
    rows = [
        ("tokens", f"{recorded.step * config.batch_tokens:,}"),
        ("steps", f"{recorded.step:,} of {config.num_steps:,}"),
        ("batch", f"{config.loop.batch_size:,} sequences of {config.data.seq_len:,} tokens"),
        ("optimizer of the hidden matrices", "Muon" if isinstance(optim, MuonConfig) else "AdamW"),
        ("peak learning rate of the hidden matrices", f"{optim.lr:g}"),
        ("peak learning rate of all else (AdamW)", f"{optim.aux.lr:g}"),
        ("weight decay (hidden / all else)", f"{optim.weight_decay:g} / {optim.aux.weight_decay:g}"),
    ]
    if isinstance(optim, MuonConfig):
        newton_schulz = optim.newton_schulz
        rows += [
            ("momentum", f"{optim.momentum:g}{', Nesterov' if optim.nesterov else ''}"),
            ("orthogonalization", f"{newton_schulz.steps} steps, {newton_schulz.coefficients}"),
            ("scaling of updates", optim.scaling),
        ]
    if optim.overrides:
        rows.append(("parameters with other settings", f"{len(optim.overrides)} tables of optim.overrides"))
    return [
        *rows,
        ("schedule", f"{schedule.kind}, {schedule.warmup_steps} steps of warm-up"),
        ("clipping", f"gradient norm {config.loop.grad_clip:g}" if config.loop.grad_clip else "none"),
        ("seed", str(config.seed)),
    ]


def _result_rows(recorded: Recorded) -> list[Row]:
    rows = []
    if recorded.train is not None:
        rows.append((f"training loss of step {recorded.train['step']:,}", f"{recorded.train['loss']:.4f} nats a token"))
    if (found := recorded.evaluation) is not None:
        where = f"step {found['step']:,}, {found['eval_tokens']:,} held-out tokens"
        rows.append((f"validation loss ({where})", f"{found['loss']:.4f} nats a token"))
        rows.append(("the same in bits per byte of text", f"{found['bits_per_byte']:.4f}"))
    return rows


def _data_rows(config: TrainConfig, manifest: Manifest) -> list[Row]:
    train = manifest.splits["train"]
    return [
        ("source", str(manifest.source.get("kind", config.data.path))),
        ("training split", f"{train.num_tokens:,} tokens, {train.num_documents:,} documents"),
        ("bytes of text per token", f"{train.bytes_per_token:.2f}"),
        ("tokenizer (sha256)", manifest.tokenizer_fingerprint),
    ]


def _software_rows(recorded: Recorded) -> list[Row]:
    names = ("muonlm", "git", "torch", "python", "precision", "device", "world_size")
    found = recorded.environment
    return [(name.replace("_", " "), str(found[name])) for name in names if found.get(name) is not None]


def _table(rows: list[Row]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
