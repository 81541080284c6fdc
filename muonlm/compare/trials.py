"""Which runs a comparison needs, given the losses known so far, and the training config of each.

An arm is tuned along `lr` at its middle `aux_lr`, then along `aux_lr` at its best `lr`, on one seed and one budget;
then its best pair runs at each of its budgets for every seed. All arms get the same number of tuning runs, and share
every setting that is not part of their optimizer or schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from muonlm.config.compare import CompareConfig
from muonlm.config.errors import UserError
from muonlm.config.load import apply_overrides, load_train_dict, validate
from muonlm.config.optim import AdamWConfig, MuonConfig
from muonlm.config.schema import TrainConfig

Phase = Literal["tune", "final"]

ARM_KEYS = ("optim.", "schedule.", "loop.grad_clip")
"""What an arm may set: its optimizer and schedule. The rest is the same for all arms, in the comparison's own `set`."""

OWN_KEYS = ("name", "seed", "run_dir", "optim.lr", "optim.aux.lr", "loop.tokens", "loop.steps", "track.console")
"""What the comparison itself decides for each run."""


@dataclass(frozen=True)
class Trial:
    """One training run: a point of the plan. `phase` says what it is needed for first."""

    arm: str
    phase: Phase
    budget_tokens: int
    seed: int
    lr: float
    aux_lr: float

    @property
    def point(self) -> tuple[str, int, int, float, float]:
        """What the run's result depends on; two trials with one point are one run."""
        return self.arm, self.budget_tokens, self.seed, self.lr, self.aux_lr

    @property
    def directory(self) -> str:
        """Run directory below the comparison's."""
        rates = f"lr{self.lr:.12g}-aux{self.aux_lr:.12g}".replace("+", "")  # 1e+30, and a run's name has no plus
        return f"runs/{self.arm}/{self.phase}-b{self.budget_tokens}-s{self.seed}-{rates}"


Losses = Mapping[tuple[str, int, int, float, float], float]
"""End loss of every point that is done; infinity where the run failed."""


@dataclass(frozen=True)
class Best:
    """The tuned pair of an arm. Interior: both neighbours in the grid were tried and are no better."""

    lr: float
    aux_lr: float
    loss: float
    lr_is_interior: bool
    aux_lr_is_interior: bool


@dataclass(frozen=True)
class Arm:
    """One competitor with its grids and its share of the plan."""

    name: str
    lr: tuple[float, ...]
    aux_lr: tuple[float, ...]
    budgets_tokens: tuple[int, ...]
    seeds: tuple[int, ...]
    tune_seed: int
    tune_budget_tokens: int

    def _tuning(self, lr: float, aux_lr: float) -> Trial:
        return Trial(self.name, "tune", self.tune_budget_tokens, self.tune_seed, lr, aux_lr)

    @property
    def middle_aux_lr(self) -> float:
        """The `aux_lr` at which `lr` is tuned; the lower one of two middles."""
        return self.aux_lr[(len(self.aux_lr) - 1) // 2]

    def lr_sweep(self) -> list[Trial]:
        """The first sweep: every `lr` at the middle `aux_lr`."""
        return [self._tuning(lr, self.middle_aux_lr) for lr in self.lr]

    def aux_lr_sweep(self, losses: Losses) -> list[Trial]:
        """The second sweep: every `aux_lr` at the best `lr`; empty while the first is unfinished, or all failed."""
        sweep = self.lr_sweep()
        if any(trial.point not in losses for trial in sweep):
            return []
        best = min(sweep, key=lambda trial: losses[trial.point])
        return [self._tuning(best.lr, aux_lr) for aux_lr in self.aux_lr] if losses[best.point] < math.inf else []

    def check_not_failed(self, losses: Losses) -> None:
        """Raises UserError when every run of the first sweep failed."""
        if all(losses.get(trial.point) == math.inf for trial in self.lr_sweep()):
            raise UserError(
                f"arm {self.name}: every run of the lr sweep diverged ({', '.join(f'{lr:g}' for lr in self.lr)}); "
                "lower its learning rates in the comparison's config"
            )

    def best(self, losses: Losses) -> Best | None:
        """The tuned pair; None while tuning is unfinished."""
        sweep = self.aux_lr_sweep(losses)
        if not sweep or any(trial.point not in losses for trial in sweep):
            return None
        best = min(sweep, key=lambda trial: losses[trial.point])
        return Best(
            best.lr,
            best.aux_lr,
            losses[best.point],
            best.lr not in (self.lr[0], self.lr[-1]),
            best.aux_lr not in (self.aux_lr[0], self.aux_lr[-1]),
        )

    def final_trials(self, losses: Losses) -> list[Trial]:
        """The best pair at each budget for every seed; empty while tuning is unfinished."""
        best = self.best(losses)
        if best is None:
            return []
        return [
            Trial(self.name, "final", budget, seed, best.lr, best.aux_lr)
            for budget in self.budgets_tokens
            for seed in self.seeds
        ]

    def all_trials(self, losses: Losses) -> list[Trial]:
        """Every trial that is known to be needed; a point can stand in it as tuning and as final run."""
        trials = [*self.lr_sweep(), *self.aux_lr_sweep(losses), *self.final_trials(losses)]
        return list(dict.fromkeys(trials))

    @property
    def total_tokens(self) -> int:
        """Tokens of all runs of this arm, known before any of them is done."""
        tuning = (len(self.lr) + len(self.aux_lr) - 1) * self.tune_budget_tokens
        shared = self.tune_budget_tokens in self.budgets_tokens and self.tune_seed in self.seeds
        return tuning + sum(self.budgets_tokens) * len(self.seeds) - shared * self.tune_budget_tokens


def plan_arms(config: CompareConfig) -> list[Arm]:
    """The arms of a comparison. Raises UserError where their grids would not make a fair comparison."""
    for length, key in ((lambda arm: len(arm.lr), "lr"), (lambda arm: len(arm.aux_lr), "aux_lr")):
        if len({length(arm) for arm in config.arms}) > 1:
            counts = ", ".join(f"{arm.name} has {length(arm)}" for arm in config.arms)
            raise UserError(
                f"arms: the grids of {key} have different lengths ({counts}). Every arm must get the same number of "
                "tuning runs: the arm that tries more settings wins by that alone. Give all arms equally many."
            )
    for arm in config.arms:
        for key, grid in (("lr", arm.lr), ("aux_lr", arm.aux_lr)):
            if any(a >= b for a, b in pairwise(grid)):
                raise UserError(f"arm {arm.name}: {key} = {grid} is not ascending; sort it, without repeats")
    return [
        Arm(
            arm.name,
            tuple(arm.lr),
            tuple(arm.aux_lr),
            tuple(sorted(set(arm.budgets_tokens or config.budgets_tokens))),
            tuple(dict.fromkeys(config.seeds)),
            config.tune.seed,
            config.tune.budget_tokens or max(config.budgets_tokens),
        )
        for arm in config.arms
    ]


def check_tuning_budget(config: CompareConfig, batch_tokens: int) -> None:
    """Raises UserError where a tuning run would be shorter than one batch."""
    budget = config.tune.budget_tokens
    if budget is not None and budget < batch_tokens:
        raise UserError(
            f"tune.budget_tokens = {budget} is less than one batch ({batch_tokens} tokens); raise it, or leave it out "
            "to tune on the largest of budgets_tokens"
        )


def train_configs(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """Raw train config of each arm, still without budget, seed and learning rates. Raises UserError where unfair."""
    for place, values in [("set", config.set), *((f"arm {arm.name}: set", arm.set) for arm in config.arms)]:
        if own := sorted(key for key in flatten(values) if key in OWN_KEYS):
            raise UserError(f"{place}: {', '.join(own)} is decided by the comparison for each run; remove it")
    base = base_config(config)
    if base.get("branch_from") is not None:
        raise UserError(
            "branch_from in a comparison: its optimizer would go on in one arm and begin anew in the other, and its "
            "tokens would count in every budget; compare runs from the start, or from init_from"
        )
    raws: dict[str, dict[str, Any]] = {}
    for arm in config.arms:
        if wrong := sorted(key for key in flatten(arm.set) if not key.startswith(ARM_KEYS)):
            raise UserError(
                f"arm {arm.name}: set may change optim.*, schedule.* and loop.grad_clip, not {', '.join(wrong)}. "
                "What else differs between arms would be measured along; put it into the comparison's own [set]."
            )
        raws[arm.name] = apply_overrides(base, arm.set)
    _check_fair(raws, config)
    return raws


def base_config(config: CompareConfig) -> dict[str, Any]:
    """Raw train config that all arms start from."""
    return apply_overrides(load_train_dict(config.base), config.set)


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys: {"optim": {"lr": 1}} gives {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_fair(raws: dict[str, dict[str, Any]], config: CompareConfig) -> None:
    """What may not differ between arms although it is part of the optimizer."""
    optims: dict[str, MuonConfig | AdamWConfig] = {
        arm.name: trial_config(raws[arm.name], arm.lr_sweep()[0], Path("."), config.name).optim
        for arm in plan_arms(config)
    }
    _check_same_aux(optims, config)
    reference = optims[config.reference]
    for name, optim in optims.items():
        if optim.non_finite != reference.non_finite:
            raise UserError(
                f"arm {name}: optim.non_finite = {optim.non_finite} ({config.reference}: {reference.non_finite}). What "
                "becomes of a step that fails must be the same in every arm; set it in the comparison's own [set]."
            )
        if _fixed_rates(optim) != _fixed_rates(reference):
            raise UserError(
                f"arm {name}: optim.overrides set other learning rates or weight decays than those of "
                f"{config.reference}. Only lr and aux_lr are tuned, so that an arm may not bring rates of its own: "
                "leave them out of its overrides, or set the same overrides for all arms in the comparison's own [set]."
            )


def _fixed_rates(optim: MuonConfig | AdamWConfig) -> list[dict[str, Any]]:
    """The overrides that give a learning rate or a weight decay: whom they select, and what they give."""
    keys = {"roles", "names", "modules", "lr", "weight_decay"}
    given = [override for override in optim.overrides if not (override.lr is None and override.weight_decay is None)]
    return sorted((override.model_dump(include=keys) for override in given), key=str)


def _check_same_aux(optims: Mapping[str, MuonConfig | AdamWConfig], config: CompareConfig) -> None:
    """Embedding, head and norms must be under the same AdamW in every arm, learning rate aside."""
    tables = {name: optim.aux.model_dump(exclude={"lr"}) for name, optim in optims.items()}
    reference = tables[config.reference]
    for name, table in tables.items():
        if wrong := [key for key in table if table[key] != reference[key]]:
            values = ", ".join(f"optim.aux.{k} = {table[k]} ({config.reference}: {reference[k]})" for k in wrong)
            raise UserError(
                f"arm {name}: {values}. Embedding, head and norms must have the same optimizer in every arm; "
                "set it for all arms in the comparison's own [set]."
            )


def trial_config(
    raw: dict[str, Any], trial: Trial, directory: Path, name: str, decided: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The training config of one trial, with its run directory below `directory`.

    `decided` replaces settings that the configuration leaves open ("auto", or 0 for loop.threads).
    """
    label = Path(trial.directory)
    settings: dict[str, Any] = {
        "name": f"{name}-{trial.arm}-{label.name}",
        "run_dir": str(directory / label),
        "seed": trial.seed,
        "optim.lr": trial.lr,
        "optim.aux.lr": trial.aux_lr,
        "loop.tokens": trial.budget_tokens,
        "track.console": False,
    }
    origin = f"{name}: arm {trial.arm}"
    config = validate(TrainConfig, apply_overrides(raw, settings), origin)
    flat = flatten(config.model_dump())
    settings |= {key: value for key, value in (decided or {}).items() if flat.get(key) in ("auto", 0)}
    return validate(TrainConfig, apply_overrides(raw, settings), origin)
