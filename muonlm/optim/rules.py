"""Which parameter gets Muon and which AdamW, and with which settings: by role, then by the overrides. Fails closed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from muonlm.config.errors import UserError
from muonlm.config.optim import AdamWConfig, MuonConfig, OverrideConfig, Role, ScalingName
from muonlm.optim.pieces import Split, pieces_of
from muonlm.optim.roles import Parameter, describe_parameters
from muonlm.optim.select import is_selected, split_of

Rule = Literal["muon", "adamw"]
_SHOWN = 20


@dataclass(frozen=True)
class ParamRule:
    """The rule of one parameter. `group` names its parameter group, `lr` the peak learning rate there.

    `betas` and `eps` are None under Muon; `scaling`, `split` and `is_convolution` say nothing under AdamW.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    role: Role | None
    rule: Rule
    group: str
    lr: float
    weight_decay: float
    betas: tuple[float, float] | None = None
    eps: float | None = None
    scaling: ScalingName | None = None
    split: Split | None = None
    is_convolution: bool = False

    def options(self) -> dict[str, Any]:
        """What the parameter group of this parameter has besides `name` and `params`; members of a group agree."""
        common = {"rule": self.rule, "lr": self.lr, "base_lr": self.lr, "weight_decay": self.weight_decay}
        if self.rule == "adamw":
            return {**common, "betas": self.betas, "eps": self.eps}
        return {**common, "scaling": self.scaling, "split": self.split, "convolution": self.is_convolution}


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each trainable parameter, in the order of `model.named_parameters()`.

    See `muonlm.optim.roles.describe_parameters`. Raises UserError that lists every parameter without a role.
    """
    params = describe_parameters(model)
    _check_known(params, set())
    return {param.name: param.role for param in params if param.role is not None}


def assign_rules(model: nn.Module, config: MuonConfig | AdamWConfig) -> list[ParamRule]:
    """One `ParamRule` for each trainable parameter, in the order of `model.named_parameters()`.

    Hidden matrices, expert stacks and convolutions follow `config`; everything else follows `config.aux` under AdamW,
    norms and biases without weight decay. What an override gives comes first. Parameters with one base name (that of
    the override's group, else of the role) and equal settings are one group; where settings differ, the groups are
    numbered: hidden, hidden.1, hidden.2.

    Raises UserError that lists: parameters that no rule describes; overrides that select nothing, and parameters
    selected twice; parameters that cannot be under Muon; and when nothing is left for Muon.
    """
    params = describe_parameters(model)
    chosen = _choose(params, config.overrides)
    _check_known(params, {name for name, number in chosen.items() if config.overrides[number].rule is not None})
    rules = []
    for param in params:
        number = chosen.get(param.name)
        rules.append(_rule(param, config, config.overrides[number] if number is not None else None))
    _check_muon(params, rules)
    _check_effect(rules, chosen, config)
    if isinstance(config, MuonConfig) and config.overrides and not any(rule.rule == "muon" for rule in rules):
        raise UserError("optim.overrides leave nothing for Muon; for AdamW alone set optim.kind=adamw")
    if not any(rule.rule == "muon" for rule in rules) and not any(param.is_main for param in params):
        raise UserError("the model has no hidden matrix (an nn.Linear other than the head): there is nothing to train")
    return _with_groups(rules, set(chosen))


def _choose(params: Sequence[Parameter], overrides: Sequence[OverrideConfig]) -> dict[str, int]:
    """The number of the override that selects a parameter, by name. Raises UserError for none and for several."""
    selected: dict[str, list[int]] = {}
    problems = []
    for number, override in enumerate(overrides):
        names = [p.name for p in params if is_selected(override, names=p.names, role=p.role, classes=p.classes)]
        for name in names:
            selected.setdefault(name, []).append(number)
        if not names:
            problems.append(f"  optim.overrides[{number}] selects no trainable parameter: {_selectors(override)}")
    problems += [
        f"  {name} is selected by {' and '.join(f'optim.overrides[{number}]' for number in numbers)}"
        for name, numbers in selected.items()
        if len(numbers) > 1
    ]
    if problems:
        example = params[0].name if params else "of the model"
        raise UserError(
            f"optim.overrides do not fit the model:\n{_listed(problems)}\n"
            f"a parameter may be selected once; names are matched whole, as in {example}"
        )
    return {name: numbers[0] for name, numbers in selected.items()}


def _selectors(override: OverrideConfig) -> str:
    given = {key: getattr(override, key) for key in ("roles", "names", "modules")}
    return ", ".join(f"{key} = {value}" for key, value in given.items() if value is not None)


def _check_known(params: Sequence[Parameter], ruled: set[str]) -> None:
    """A parameter without a role is an error, unless an override has given it a rule."""
    unknown = [f"  {param.owner}" for param in params if param.role is None and param.name not in ruled]
    if unknown:
        raise UserError(
            "no rule says whether these parameters get Muon or AdamW:\n"
            + "\n".join(unknown)
            + "\nrules know layers of torch.nn, routers, expert stacks and vectors; for others give a class attribute "
            'such as parameter_roles = {"weight": "hidden"}, or a rule in optim.overrides'
        )


def _rule(param: Parameter, config: MuonConfig | AdamWConfig, override: OverrideConfig | None) -> ParamRule:
    """Settings by role and override; the group is the base name for now."""
    rule: Rule = "muon" if param.is_main and config.kind == "muon" else "adamw"
    if override is not None and override.rule is not None:
        rule = override.rule
    is_main = rule == "muon" or (param.is_main and isinstance(config, AdamWConfig))
    adam = config if isinstance(config, AdamWConfig) and is_main else config.aux
    decays = param.role not in ("norm", "bias") and len(param.shape) > 1
    result = ParamRule(
        name=param.name,
        shape=param.shape,
        numel=param.numel,
        role=param.role,
        rule=rule,
        group="norm" if param.role == "bias" else param.role or "other",
        lr=config.lr if is_main else config.aux.lr,
        weight_decay=config.weight_decay if is_main else config.aux.weight_decay if decays else 0.0,
        betas=(adam.beta1, adam.beta2) if rule == "adamw" else None,
        eps=adam.eps if rule == "adamw" else None,
        scaling=config.scaling if isinstance(config, MuonConfig) and rule == "muon" else None,
        split=param.split if rule == "muon" else None,
        is_convolution=rule == "muon" and param.role == "convolution",
    )
    return result if override is None else _overridden(result, override)


def _overridden(rule: ParamRule, override: OverrideConfig) -> ParamRule:
    keys = ["group", "lr", "weight_decay"] + (["scaling"] if rule.rule == "muon" else [])
    changes = {key: value for key in keys if (value := getattr(override, key)) is not None}
    if rule.rule == "muon" and override.split is not None:
        changes["split"] = split_of(override.split)
    return replace(rule, **changes)


def _check_muon(params: Sequence[Parameter], rules: Sequence[ParamRule]) -> None:
    """What is under Muon must be matrices that its scaling and split fit."""
    problems = []
    for param, rule in zip(params, rules, strict=True):
        if rule.rule != "muon":
            continue
        if param.obstacle is not None:
            problems.append(f"  {param.name} {param.shape} is {param.obstacle}, which Muon cannot orthogonalize")
        elif param.is_transposed and rule.scaling != "rms_adamw":
            problems.append(
                f"  {param.name} {param.shape} is stored (in, out), and {rule.scaling} would take in for out; "
                'give it scaling = "rms_adamw"'
            )
        elif rule.split is not None:
            try:
                pieces_of(0, param.name, _stack_shape(rule), rule.split)
            except UserError as error:
                problems.append(f"  {error}")
    if problems:
        raise UserError(
            f"these parameters cannot be under Muon as asked for:\n{_listed(problems)}\n"
            'see optim.overrides; rule = "adamw" takes any parameter'
        )


def _stack_shape(rule: ParamRule) -> tuple[int, int, int]:
    """The shape as a stack of one matrix: what is split is the same in each of them."""
    if rule.is_convolution:
        return 1, rule.shape[0], rule.numel // rule.shape[0]
    return 1, rule.shape[-2], rule.shape[-1]


def _check_effect(rules: Sequence[ParamRule], chosen: dict[str, int], config: MuonConfig | AdamWConfig) -> None:
    """Scaling and split must reach something; with AdamW everywhere they wait for the other kind."""
    if isinstance(config, AdamWConfig):
        return
    reached = {chosen[rule.name] for rule in rules if rule.rule == "muon" and rule.name in chosen}
    idle = [
        f"  optim.overrides[{number}] ({_selectors(override)})"
        for number, override in enumerate(config.overrides)
        if number not in reached and (override.scaling is not None or override.split is not None)
    ]
    if idle:
        raise UserError(
            "scaling and split matter under Muon only, and all parameters that these select are under AdamW:\n"
            + _listed(idle)
        )


def _listed(lines: list[str]) -> str:
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join(lines[:_SHOWN] + more)


def _with_groups(rules: Sequence[ParamRule], overridden: set[str]) -> list[ParamRule]:
    """Name the groups: of one base name, the settings that no override touched keep the name without a number."""
    numbers: dict[str, list[tuple[Any, ...]]] = {}
    for rule in sorted(rules, key=lambda rule: rule.name in overridden):
        settings = numbers.setdefault(rule.group, [])
        if tuple(rule.options().values()) not in settings:
            settings.append(tuple(rule.options().values()))
    taken = set(numbers)
    names: dict[tuple[str, int], str] = {}
    for base, settings in numbers.items():
        suffix = 0
        for number in range(len(settings)):
            name = base
            while number and name in taken:
                suffix += 1
                name = f"{base}.{suffix}"
            taken.add(name)
            names[base, number] = name
    return [
        replace(rule, group=names[rule.group, numbers[rule.group].index(tuple(rule.options().values()))])
        for rule in rules
    ]


def groups_of(rules: Iterable[ParamRule]) -> dict[str, list[ParamRule]]:
    """The rules by parameter group, in model order."""
    groups: dict[str, list[ParamRule]] = {}
    for rule in rules:
        groups.setdefault(rule.group, []).append(rule)
    return groups
