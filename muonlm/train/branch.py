"""A run that branches off another: its weights, its place in the data and its optimizer's state, other settings."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from muonlm.checkpoint.read import find
from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.train.run_dir import config_differences

# What the weights, and the number of sequences that were read, mean.
_KEPT = ("model.", "data.seq_len", "seed", "loop.batch_size")
_DATA = ("tokenizer_fingerprint", "validation_fingerprint")


@dataclass(frozen=True)
class Branch:
    """The checkpoint that a run starts from; `with_optimizer` where its optimizer's state is taken too.

    `data` are fingerprints of the data that it was trained on.
    """

    path: Path
    with_optimizer: bool
    data: Mapping[str, Any]

    def check_data(self, environment: Mapping[str, Any]) -> None:
        """Raise UserError where the run that begins has other data."""
        if any(self.data[key] != environment[key] for key in _DATA):
            raise UserError(
                f"branch_from {self.path}: that run was trained on other data or with another tokenizer; to go on from "
                "its weights on new text, export them and set init_from"
            )


def find_branch(config: TrainConfig) -> Branch | None:
    """The checkpoint that `config.branch_from` names, None where it names none.

    The optimizer's state is taken where both runs have the same `optim.kind`. Raises UserError where there is no
    complete checkpoint, where the two runs differ in model, batch, seed or sequence length, and where nothing is left
    to train.
    """
    if config.branch_from is None:
        return None
    path = find(config.branch_from)
    run = path.parents[1]
    old = _config_of(run)
    if differing := [line for line in config_differences(old.model_dump(), config.model_dump()) if _is_kept(line)]:
        raise UserError(
            f"branch_from {path}: what the weights and the place in the data mean may not change:\n  "
            + "\n  ".join(differing)
        )
    if (step := int(path.name.removeprefix("step_"))) >= config.num_steps:
        raise UserError(
            f"branch_from {path} stands at step {step}, and this run ends at step {config.num_steps}: raise "
            "loop.steps or loop.tokens, which count from the beginning of the first run, or name an earlier checkpoint"
        )
    recorded = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return Branch(path, old.optim.kind == config.optim.kind, {key: recorded.get(key) for key in _DATA})


def _is_kept(difference: str) -> bool:
    return difference.startswith(_KEPT)


def _config_of(run: Path) -> TrainConfig:
    try:
        return TrainConfig.model_validate(tomllib.loads((run / "config.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"branch_from: {run} has no config.toml of a run of this version: {error}") from error
