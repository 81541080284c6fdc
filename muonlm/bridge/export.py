"""Write a checkpoint as a directory that transformers' `from_pretrained` reads.

It holds weights, configuration, tokenizer and model card. Nothing here needs transformers, and the model is never
built.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from muonlm.bridge.architectures import CONFIG_NAME, to_hf_config
from muonlm.bridge.card import Recorded, model_card, read_recorded
from muonlm.bridge.tensors import Shape, model_tensors
from muonlm.bridge.tokenizer import tokenizer_files
from muonlm.bridge.weights import check_shapes, plan_shards, replaced_directory, write_model
from muonlm.config.errors import UserError
from muonlm.config.load import validate
from muonlm.config.schema import TrainConfig
from muonlm.data.manifest import read_manifest
from muonlm.model.flops import count_parameters

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run: the shape of every tensor of its model, and what reads one by name."""

    run: Path
    path: Path
    step: int
    shapes: Mapping[str, Shape]
    read: Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written: the architecture, and how much."""

    architecture: str
    num_parameters: int
    num_files: int
    num_bytes: int


def export_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    *,
    dtype: Literal["float32", "bfloat16"],
    shard_bytes: int,
    data: str | Path | None = None,
    force: bool = False,
) -> Exported:
    """Write the model of `checkpoint` to the directory `target`, whole or not at all.

    `data` is the run's prepared data, which has the tokenizer; by default where the run's configuration says.
    `shard_bytes` bounds the weights of one file. Raises UserError for a model that no architecture expresses, a
    checkpoint that does not fit the run's configuration, data of another tokenizer, a `target` that is not empty
    (unless `force` and it holds a model), and a full disk.
    """
    config = _run_config(checkpoint.run)
    recorded = read_recorded(checkpoint.run, checkpoint.step)
    vocab_size = checkpoint.shapes.get(EMBEDDING, (0,))[0]
    hf = to_hf_config(config.model, vocab_size, dtype)
    tensors = list(model_tensors(config.model, vocab_size))
    check_shapes(checkpoint.shapes, tensors, checkpoint.path)
    files = _text_files(config, recorded, data or config.data.path, hf, dtype)
    wanted = getattr(torch, dtype)
    needed_bytes = sum(shard.num_bytes for shard in plan_shards(tensors, wanted.itemsize, shard_bytes))
    with replaced_directory(target, needed_bytes, force=force) as folder:
        shards = write_model(folder, tensors, checkpoint.read, dtype=wanted, shard_bytes=shard_bytes)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    num_parameters = count_parameters(config.model, vocab_size)["total"]
    return Exported(hf["architectures"][0], num_parameters, len(shards), needed_bytes)


def _text_files(
    config: TrainConfig, recorded: Recorded, data: str | Path, hf: dict[str, Any], dtype: str
) -> dict[str, str]:
    """Content of every file but the weights, by name."""
    manifest = read_manifest(Path(data))
    expected = recorded.environment.get("tokenizer_fingerprint")
    if expected not in (None, manifest.tokenizer_fingerprint):
        raise UserError(
            f"data {data} has another tokenizer than the run was trained with (fingerprint "
            f"{manifest.tokenizer_fingerprint[:12]}, not {expected[:12]}); give the run's own data with --data"
        )
    texts, end_of_text_id = tokenizer_files(data, config.model.max_seq_len)
    hf = hf | {"bos_token_id": None, "eos_token_id": end_of_text_id}
    generation = {"eos_token_id": end_of_text_id, "pad_token_id": end_of_text_id, "do_sample": False}
    return texts | {
        CONFIG_NAME: json.dumps(hf, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "README.md": model_card(config, recorded, manifest, hf, dtype),
    }


def _run_config(run: Path) -> TrainConfig:
    file = run / "config.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{run} is no run directory: {file.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{file} is no TOML: {error}; restore it") from error
    return validate(TrainConfig, table, str(file))
