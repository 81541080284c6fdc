"""Start from the weights of another model: a directory as `muonlm export` writes it, or one of the hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from muonlm.bridge.architectures import ARCHITECTURES, CONFIG_NAME, from_hf_config, read_hf_config
from muonlm.bridge.tensors import ModelTensor, model_tensors
from muonlm.bridge.weights import INDEX_NAME
from muonlm.config.errors import UserError
from muonlm.config.model import GPTConfig, MoEConfig
from muonlm.dist import collectives
from muonlm.optim.layout import Box
from muonlm.optim.shards import tensor_shard

# Settings that the weights were trained with, and that make another model of them.
_OF_ALL = (
    "kind", "num_layers", "hidden_size", "intermediate_size", "num_heads", "resolved_kv_heads", "resolved_head_dim",
    "rms_norm_eps", "tie_embeddings", "activation", "gated", "logit_softcap",
)  # fmt: skip
_OF_EXPERTS = (
    "num_experts", "experts_per_token", "expert_size", "num_shared_experts", "num_dense_layers", "router",
    "normalize_weights", "routed_scale",
)  # fmt: skip
# Some old files hold the table of rotary frequencies, which follows from the configuration.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_FLOATS = ("F64", "F32", "F16", "BF16")
_log = logging.getLogger(__name__)


def load_pretrained(model: nn.Module, directory: str | Path) -> None:
    """Fill the parameters and buffers of `model` in place from the safetensors files in `directory`.

    `model` is a model of this package, bare, replicated, or sharded by FSDP2 and tensor parallelism: each rank reads
    what it holds, one matrix at a time, and experts of a stack one by one. Values are converted to the parameter's
    dtype. Communicates nothing; every rank of a run calls it.

    Raises UserError before anything is changed: for a directory without a model, another architecture, other settings
    or vocabulary than those of `model`, and tensors that are missing, not known or of another shape.
    """
    directory = Path(directory)
    config: GPTConfig = model.config  # type: ignore[assignment]
    vocab_size: int = model.vocab_size  # type: ignore[assignment]
    hf = read_hf_config(directory)
    _check_settings(config, vocab_size, hf, directory)
    tensors = list(model_tensors(config, vocab_size))
    state: dict[str, Any] = get_model_state_dict(model)
    with ExitStack() as stack:
        files = _Files(directory, stack)
        files.check(tensors, is_tied=config.tie_embeddings)
        for tensor in tensors:
            if tensor.is_stored:
                _fill(state[tensor.name], tensor, files)
    # All tensors are filled in place; this tells an engine that keeps copies of parameters.
    set_model_state_dict(model, state)


def _check_settings(config: GPTConfig, vocab_size: int, hf: Mapping[str, Any], directory: Path) -> None:
    """Raise UserError where the model of config.json is another one than that of `config`."""
    theirs = from_hf_config(hf, directory)
    assert theirs.vocab_size is not None
    both_moe = isinstance(config, MoEConfig) and isinstance(theirs, MoEConfig)
    differing = [
        f"model.{name.removeprefix('resolved_')} is {ours!r}, there it is {other!r}"
        for name in (*_OF_ALL, *(_OF_EXPERTS if both_moe else ()))
        if (ours := getattr(config, name)) != (other := getattr(theirs, name))
    ]
    if differing:
        raise UserError(
            f"{directory / CONFIG_NAME} describes another model ({ARCHITECTURES[hf['model_type']]}) than [model]:\n  "
            + "\n  ".join(differing)
            + f"\n`muonlm import {directory}` prints the [model] table that fits"
        )
    if theirs.vocab_size != vocab_size:
        raise UserError(
            f"the model has {vocab_size} token ids, that of {directory} {theirs.vocab_size}; set model.vocab_size = "
            f"{theirs.vocab_size} and prepare the data with its tokenizer (tokenizer.existing={directory})"
        )
    if config.rope_theta != theirs.rope_theta:
        _log.warning(
            "model.rope_theta is %g, %s was trained with %g: all positions will look different to it at first",
            *(config.rope_theta, directory, theirs.rope_theta),
        )


class _Files:
    """The safetensors files of a directory, each opened when first read from. Raises UserError for broken ones."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory, self._stack = directory, stack
        self._open: dict[str, Any] = {}
        index = directory / INDEX_NAME
        if index.is_file():
            try:
                self._file_of: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                if wrong := [name for name in self._file_of.values() if not isinstance(name, str)]:
                    raise ValueError(f"{wrong[0]!r} is no name of a file")
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{index} is damaged: {error!r}; download or export the model again") from error
        elif (directory / "model.safetensors").is_file():
            self._file_of = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        else:
            raise UserError(f"{directory} has neither model.safetensors nor {INDEX_NAME}; other formats are not read")

    def check(self, tensors: list[ModelTensor], *, is_tied: bool) -> None:
        """Raise UserError for tensors that are missing, not known, or of another shape."""
        wanted = {name: tensor for tensor in tensors for name in tensor.disk_names}
        known = wanted.keys() | ({"lm_head.weight"} if is_tied else set())
        problems = [f"{name} is missing" for name, t in wanted.items() if t.is_stored and name not in self._file_of]
        problems += [
            f"{name} is not known" for name in sorted(self._file_of.keys() - known) if not _IGNORED.search(name)
        ]
        for name, tensor in wanted.items():
            if name in self._file_of and tensor.is_stored:
                stored = self._slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if dtype not in _FLOATS:
                    problems.append(f"{name} is {dtype}; {', '.join(_FLOATS)} are read")
                if shape != tensor.disk_shape:
                    problems.append(f"{name} has shape {list(shape)}, the model {list(tensor.disk_shape)}")
        if problems:
            shown = "\n  ".join(problems[:8])
            raise UserError(
                f"the weights in {self._directory} are not those of its {CONFIG_NAME} ({len(problems)} problems):\n  "
                f"{shown}\nDownload or export the model again"
            )

    def read(self, name: str, *region: slice) -> torch.Tensor:
        """A region of one tensor, on the CPU."""
        part: torch.Tensor = self._slice(name)[region]
        return part

    def _slice(self, name: str) -> Any:
        try:
            return self._file(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(
                f"{self._directory / self._file_of[name]}: {error}, which {INDEX_NAME} says is there; download or "
                "export the model again"
            ) from error

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._directory / name
            try:
                self._open[name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}; download or export the model again") from error
        return self._open[name]


def _fill(target: torch.Tensor, tensor: ModelTensor, files: _Files) -> None:
    """Copy what this rank holds of a parameter or buffer into it."""
    assert tuple(target.shape) == tensor.shape, f"{tensor.name}: {tuple(target.shape)} instead of {tensor.shape}"
    shard = tensor_shard(tensor.name, target, is_stack=tensor.is_stack)
    local = shard.local()
    local = local[(None,) * (3 - local.ndim)]  # as (E, out, in), like the layout; a view
    with torch.no_grad():
        for holding in shard.layout.by_rank.get(collectives.rank(), ()):
            _fill_block(local, holding.box, tensor, files)


def _fill_block(local: torch.Tensor, box: Box, tensor: ModelTensor, files: _Files) -> None:
    assert tuple(local.shape) == box.shape, f"{tensor.name}: {tuple(local.shape)} instead of {box.shape}"
    rows, columns = (slice(start, start + size) for start, size in zip(box.start[1:], box.shape[1:], strict=True))
    region = (rows, columns)[-len(tensor.disk_shape) :]
    for index in range(box.shape[0]):
        local[index].copy_(files.read(tensor.disk_names[box.start[0] + index], *region))
