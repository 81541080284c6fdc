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
from muonlm.checkpoint.store import MARKER
from muonlm.config.errors import UserError
from muonlm.config.schema import MuonConfig, TrainConfig
from muonlm.train.run_dir import check_same_data, config_differences

# What the weights, and the number of sequences that were read, mean.
_KEPT = ("model.", "data.seq_len", "seed", "loop.batch_size")


@dataclass(frozen=True)
class Branch:
    """The checkpoint that a run starts from; `with_optimizer` where its optimizer's state is taken too.

    `environment` is that of the run which made it.
    """

    path: Path
    with_optimizer: bool
    environment: Mapping[str, Any]

    def check_data(self, environment: Mapping[str, Any]) -> None:
        """Raise UserError where the run that begins has other data."""
        check_same_data(
            self.environment,
            environment,
            f"branch_from {self.path}: that run was trained on other data or with another tokenizer; to go on from its "
            "weights on new text, export them and set init_from",
        )


def find_branch(config: TrainConfig) -> Branch | None:
    """The checkpoint that `config.branch_from` names, None where it names none.

    The optimizer's state is taken where both runs have the same `optim.kind`. Raises UserError where there is no
    complete checkpoint of another run, where the two runs differ in model, batch, seed or sequence length, or in what
    scales the momentum, and where nothing is left to train.
    """
    if config.branch_from is None:
        return None
    path = find(config.branch_from).resolve()
    run = path.parent.parent
    if run == Path(config.resolved_run_dir).resolve():
        raise UserError(f"branch_from {path} lies in the run directory of this run: give this one another name")
    old = _config_of(run, path)
    kept = (*_KEPT, *_scales_of_momentum(old, config))
    if differing := [d for d in config_differences(old.model_dump(), config.model_dump()) if d.startswith(kept)]:
        raise UserError(
            f"branch_from {path}: what weights, momentum and the place in the data mean may not change:\n  "
            + "\n  ".join(differing)
        )
    step = _read_json(path / MARKER)["extra"]["step"]
    if step >= config.num_steps:
        raise UserError(
            f"branch_from {path} stands at step {step}, and this run ends at step {config.num_steps}: raise "
            "loop.steps or loop.tokens, which count from the beginning of the first run, or name an earlier checkpoint"
        )
    return Branch(path, old.optim.kind == config.optim.kind, _read_json(run / "environment.json"))


def _scales_of_momentum(old: TrainConfig, new: TrainConfig) -> tuple[str, ...]:
    """Keys that say in which scale momentum is kept: (1 - momentum) lies between the forms."""
    if not (isinstance(old.optim, MuonConfig) and isinstance(new.optim, MuonConfig)):
        return ()
    return ("optim.momentum_form", "optim.momentum:") if old.optim.momentum_form == "sum" else ("optim.momentum_form",)


def _config_of(run: Path, path: Path) -> TrainConfig:
    try:
        return TrainConfig.model_validate(tomllib.loads((run / "config.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(
            f"branch_from {path}: a checkpoint is known by its run, RUN/checkpoints/step_N beside RUN/config.toml, and "
            f"in {run} there is none of this version: {error}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"branch_from: {path} cannot be read: {error}") from error
    return content
