"""The typed configuration of a comparison: arms x budgets x seeds x learning rates over one base run."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from muonlm.config.schema import NAME_PATTERN, Section, field


class ArmConfig(Section):
    """One optimizer setting that competes. Every arm is tuned over `lr` and `aux_lr` with the same number of trials."""

    name: str = field(..., "Name of the arm.", pattern=NAME_PATTERN)
    set: dict[str, Any] = field({}, "Dotted keys of the train config that this arm changes, e.g. 'optim.kind'.")
    lr: list[float] = field(..., "Learning rates of the hidden matrices to try, ascending.", min_length=1)
    aux_lr: list[float] = field(..., "Learning rates of embedding, head and norms to try, ascending.", min_length=1)
    budgets_tokens: list[int] | None = field(
        None, "Budgets of this arm's final runs; the comparison's own when unset.", unit="tokens", min_length=1
    )


class TuneConfig(Section):
    """How learning rates are chosen: along `lr` at the middle `aux_lr`, then along `aux_lr` at the best `lr`."""

    seed: int = field(0, "Seed of the tuning runs.", ge=0, lt=2**63)
    budget_tokens: int | None = field(
        None, "Budget of a tuning run; the largest budget when unset.", unit="tokens", ge=1
    )


class CompareConfig(Section):
    """Two or more arms on the same data order. Runs that already finished are not run again."""

    name: str = field(..., "Name of the comparison.", pattern=NAME_PATTERN)
    output_dir: str | None = field(None, "Directory of the comparison; runs/<name> when unset.")
    base: str = field(..., "Train config (name or path) that every arm starts from.")
    set: dict[str, Any] = field({}, "Dotted keys of the train config changed for all arms.")
    arms: list[ArmConfig] = field(..., "The arms, two or more.", min_length=2)
    reference: str = field(..., "Name of the arm that the others are measured against.")
    budgets_tokens: list[int] = field(
        ..., "Budgets of the final runs, each with its own fully decayed schedule.", unit="tokens", min_length=1
    )
    seeds: list[int] = field(..., "Seeds of the final runs; a seed is one initialisation and data order.", min_length=1)
    tune: TuneConfig = field(TuneConfig(), "Choice of learning rates.")
    jobs: int = field(0, "Runs at a time; 0: on CPU one per core, on GPU one.", ge=0)

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arm names are not unique: {', '.join(names)}")
        if self.reference not in names:
            raise ValueError(f"reference {self.reference!r} is no arm; arms: {', '.join(names)}")
        return self

    @property
    def resolved_output_dir(self) -> str:
        """Directory of the comparison."""
        return self.output_dir or f"runs/{self.name}"
