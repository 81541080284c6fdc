"""Which parameter gets Muon and which AdamW: by module type and role, never by a piece of a name. Fails closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.config.schema import AdamWConfig, MuonConfig

Role = Literal["hidden", "embedding", "head", "norm", "bias"]
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class ParamRule:
    """The rule of one parameter. `group` names its parameter group, `lr` the peak learning rate there."""

    name: str
    shape: tuple[int, ...]
    numel: int
    role: Role
    rule: Literal["muon", "adamw"]
    group: str
    lr: float
    weight_decay: float


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each trainable parameter, in the order of `model.named_parameters()`.

    Embeddings are `nn.Embedding` tables; the head is the module that `model.get_output_embeddings()` returns; every
    other `nn.Linear` weight is a hidden matrix; one-dimensional parameters of other modules are norm scales. A tied
    table counts once, as embedding. Raises UserError that lists every parameter that none of these describes.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    by_id: dict[int, Role] = {}
    unknown: list[str] = []
    for module_name, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            role = _role(module, name, param, head)
            if role is None:
                unknown.append(
                    f"  {module_name}.{name} {tuple(param.shape)} in {type(module).__module__}.{type(module).__name__}"
                )
            elif by_id.get(id(param)) != "embedding":
                by_id[id(param)] = role
    if unknown:
        raise UserError(
            "no rule says whether these parameters get Muon or AdamW:\n"
            + "\n".join(unknown)
            + "\nrules know nn.Linear, nn.Embedding, norms and other one-dimensional parameters"
        )
    return {name: by_id[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def _role(module: nn.Module, name: str, param: nn.Parameter, head: nn.Module | None) -> Role | None:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        if name == "bias":
            return "bias"
        return "head" if module is head else "hidden"
    if isinstance(module, _NORMS) or param.ndim <= 1:
        return "bias" if name == "bias" else "norm"
    return None


def assign_rules(model: nn.Module, config: MuonConfig | AdamWConfig) -> list[ParamRule]:
    """One `ParamRule` for each trainable parameter, in the order of `model.named_parameters()`.

    Hidden matrices follow `config`; embedding, head, norms and biases follow `config.aux` under AdamW, norms and
    biases without weight decay. Raises UserError when a parameter matches no rule or nothing is left for Muon.
    """
    params = dict(model.named_parameters())
    rules = []
    for name, role in parameter_roles(model).items():
        shape = tuple(params[name].shape)
        hidden = role == "hidden"
        decays = role in ("embedding", "head")
        rules.append(
            ParamRule(
                name=name,
                shape=shape,
                numel=params[name].numel(),
                role=role,
                rule="muon" if hidden and config.kind == "muon" else "adamw",
                group="norm" if role == "bias" else role,
                lr=config.lr if hidden else config.aux.lr,
                weight_decay=config.weight_decay if hidden else config.aux.weight_decay if decays else 0.0,
            )
        )
    if not any(rule.role == "hidden" for rule in rules):
        raise UserError("the model has no hidden matrix (an nn.Linear other than the head): there is nothing to train")
    return rules


def rules_table(rules: list[ParamRule]) -> str:
    """A plain-text table of the rules, one parameter a line, with totals by group."""
    width = max(len(rule.name) for rule in rules)
    lines = [f"{'parameter':<{width}}  {'shape':>16}  {'role':<9}  {'rule':<5}  {'group':<9}  {'lr':>8}  {'decay':>6}"]
    for r in rules:
        shape = "x".join(map(str, r.shape))
        lines.append(
            f"{r.name:<{width}}  {shape:>16}  {r.role:<9}  {r.rule:<5}  {r.group:<9}  {r.lr:>8.2g}  "
            f"{r.weight_decay:>6.2g}"
        )
    for group in dict.fromkeys(rule.group for rule in rules):
        members = [rule for rule in rules if rule.group == group]
        total = sum(rule.numel for rule in members)
        lines.append(f"group {group}: {len(members)} parameters, {total:,} elements, {members[0].rule}")
    return "\n".join(lines)


def named_groups(model: nn.Module, rules: list[ParamRule]) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """Parameters with their names by group, in model order, as `torch.optim` takes them."""
    params = dict(model.named_parameters())
    groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for rule in rules:
        # Norms do not decay and tables may, so that a group has one weight decay.
        groups.setdefault(rule.group, []).append((rule.name, params[rule.name]))
    return groups
