"""The typed configuration of the optimizer. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from muonlm.config.section import NAME_PATTERN, Section, field

Role = Literal["hidden", "experts", "convolution", "embedding", "head", "router", "norm", "bias"]
ROLES: tuple[Role, ...] = get_args(Role)

ScalingName = Literal["jordan", "spectral", "rms_adamw"]
NonFinite = Literal["raise", "skip"]

_NON_FINITE = (
    "What happens on a loss or gradient that is NaN or infinite on any rank: raise stops all ranks, skip leaves the "
    "step out on all ranks."
)
_OVERRIDES = "Other settings for some parameters."


class SplitConfig(Section):
    """A weight that consists of several matrices, which Muon orthogonalizes one by one; also of each expert."""

    sizes: list[int] = field(
        ..., "Length of each matrix along dim, in order; of one group where there are several.", min_length=1
    )
    groups: int = field(
        1, "How often sizes repeats along dim: the key heads of a projection interleaved by head.", ge=1
    )
    separate_groups: bool = field(
        False, "Each group has matrices of its own; else piece j of all groups together is one matrix."
    )
    dim: int = field(0, "The dim that is divided, of a matrix as it is stored: 0 rows, 1 columns.", ge=0, le=1)

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.sizes) < 1:
            raise ValueError("every number in sizes must be at least 1")
        return self


class OverrideConfig(Section):
    """Other settings for the parameters that match every selector given: roles, names, modules.

    A table that selects no parameter, and a parameter that two tables select, are errors. `rules.txt` in the run
    directory shows the outcome.
    """

    roles: list[Role] | None = field(None, "Roles, as in rules.txt.", min_length=1)
    names: list[str] | None = field(
        None, "Glob patterns over whole parameter names; * also stands for dots.", min_length=1
    )
    modules: list[str] | None = field(
        None, "Class names of the module that owns the parameter; a base class will do.", min_length=1
    )
    group: str | None = field(
        None, "Name of the parameter group in metrics; made from the role when unset.", pattern=NAME_PATTERN
    )
    rule: Literal["muon", "adamw"] | None = field(None, "Rule, in place of that of the role.")
    lr: float | None = field(
        None, "Peak learning rate; unset: optim.lr under the rule of hidden matrices, else optim.aux.lr.", gt=0
    )
    weight_decay: float | None = field(
        None, "Decoupled weight decay; where unset, it comes from the same table as lr.", ge=0
    )
    scaling: ScalingName | None = field(None, "As optim.scaling; matters where the rule is muon.")
    split: SplitConfig | None = field(None, "Matrices that the weight consists of; matters where the rule is muon.")

    @model_validator(mode="after")
    def _selects_and_changes(self) -> Self:
        if self.roles is None and self.names is None and self.modules is None:
            raise ValueError("select parameters by at least one of roles, names and modules")
        changes = (self.group, self.rule, self.lr, self.weight_decay, self.scaling, self.split)
        if all(change is None for change in changes):
            raise ValueError("nothing is changed: give at least one of group, rule, lr, weight_decay, scaling, split")
        if self.rule == "adamw" and (self.scaling is not None or self.split is not None):
            raise ValueError('scaling and split say nothing about parameters with rule = "adamw"')
        return self


class AuxConfig(Section):
    """AdamW for embedding, head, routers, norms, biases, depthwise convolutions. The same table in every arm."""

    lr: float = field(1.6e-2, "Peak learning rate of embedding, head, norms and biases.", gt=0)
    beta1: float = field(0.9, "Decay of the first moment.", ge=0, lt=1)
    beta2: float = field(0.95, "Decay of the second moment.", ge=0, lt=1)
    eps: float = field(1e-8, "Added to the root of the second moment.", gt=0)
    weight_decay: float = field(
        0.0, "Decoupled weight decay of what is here, but for norms and biases, which have none.", ge=0
    )


class NewtonSchulzConfig(Section):
    """The matrix iteration that replaces the momentum by its nearest semi-orthogonal matrix."""

    coefficients: Literal["jordan", "quintic", "polar_express"] = field(
        "polar_express", "Named coefficient set of the Newton-Schulz iteration."
    )
    steps: int = field(5, "Iterations.", ge=1, le=20)
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        "auto", "Precision of the iterates: auto takes bfloat16 where the device multiplies it fast."
    )
    compensated: bool = field(
        False, "Carry the rounding of the first iterates, which is noise in the update of a gradient of low rank."
    )


class ExchangeConfig(Section):
    """What travels between ranks so that each matrix is orthogonalized whole, once."""

    bucket_bytes: int = field(2**27, "What a rank assembles and computes at a time.", unit="bytes", ge=1)
    depth: int = field(1, "Buckets that are on their way while one is computed.", ge=0)
    split_min_flops: int = field(
        10**9, "Least work of a matrix that several ranks may share.", unit="FLOPs of Newton-Schulz", ge=0
    )


class MuonConfig(Section):
    """Muon on hidden matrices, expert stacks and convolutions, AdamW (`optim.aux`) on the rest."""

    kind: Literal["muon"] = field("muon", "Optimizer of the hidden matrices.")
    lr: float = field(4e-3, "Peak learning rate of the hidden matrices.", gt=0)
    momentum: float = field(0.95, "Momentum coefficient.", ge=0, lt=1)
    nesterov: bool = field(True, "Look ahead by one momentum step before orthogonalizing.")
    momentum_form: Literal["ema", "sum"] = field(
        "ema", "ema weighs a new gradient by 1 - momentum, sum by 1; the updates are the same but for rounding."
    )
    momentum_dtype: Literal["auto", "float32", "bfloat16"] = field(
        "auto", "Precision that momentum is kept in: auto is that of the parameter."
    )
    weight_decay: float = field(0.1, "Decoupled weight decay of the hidden matrices.", ge=0)
    cautious: bool = field(False, "Decay only the weights that the update moves towards zero (arXiv 2510.12402).")
    scaling: ScalingName = field(
        "rms_adamw",
        "Factor on the orthogonal update of an (out, in) matrix: jordan sqrt(max(1, out/in)), "
        "spectral sqrt(out/in), rms_adamw 0.2*sqrt(max(out, in)), which gives the RMS of an AdamW update.",
    )
    non_finite: NonFinite = field("raise", _NON_FINITE)
    newton_schulz: NewtonSchulzConfig = field(NewtonSchulzConfig(), "Orthogonalization.")
    exchange: ExchangeConfig = field(ExchangeConfig(), "Traffic between ranks.")
    aux: AuxConfig = field(AuxConfig(), "AdamW for everything that Muon does not take.")
    overrides: list[OverrideConfig] = field([], _OVERRIDES)


class AdamWConfig(Section):
    """AdamW everywhere, with a learning rate of its own for hidden matrices and one for the rest."""

    kind: Literal["adamw"] = field("adamw", "Optimizer of the hidden matrices.")
    lr: float = field(2e-3, "Peak learning rate of the hidden matrices.", gt=0)
    beta1: float = field(0.9, "Decay of the first moment.", ge=0, lt=1)
    beta2: float = field(0.95, "Decay of the second moment.", ge=0, lt=1)
    eps: float = field(1e-8, "Added to the root of the second moment.", gt=0)
    weight_decay: float = field(0.1, "Decoupled weight decay of the hidden matrices.", ge=0)
    non_finite: NonFinite = field("raise", _NON_FINITE)
    aux: AuxConfig = field(AuxConfig(), "AdamW for everything that is not a hidden matrix.")
    overrides: list[OverrideConfig] = field([], _OVERRIDES)

    @model_validator(mode="after")
    def _without_muon(self) -> Self:
        if any(override.rule == "muon" for override in self.overrides):
            raise ValueError('optim.overrides with rule = "muon" need optim.kind = "muon"')
        return self


OptimConfig = Annotated[MuonConfig | AdamWConfig, Field(discriminator="kind")]
