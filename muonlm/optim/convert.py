"""Parameter groups and optimizer states of other implementations of Muon, as those of `muonlm.optim.muon.Muon`.

    converted = convert_groups(peer.param_groups, "torch")
    optimizer = Muon(converted.groups, **converted.options)
    load_state(optimizer, peer.param_groups, peer.state, "torch")

Sources, as of 2026: "torch" is torch.optim.Muon; "kellerjordan" is KellerJordan/Muon, plain or with its auxiliary Adam;
"dion" is the Muon of microsoft/dion. What has no equivalent here raises UserError and is named: it would train
something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from muonlm.config.errors import UserError
from muonlm.optim.muon import Muon
from muonlm.optim.pieces import Split
from muonlm.optim.scaling import Scaling, update_scale
from muonlm_kernels import COEFFICIENTS, coefficients

Source = Literal["torch", "kellerjordan", "dion"]
Group = dict[str, Any]

# Keys that say nothing about the update.
_NEUTRAL = {"params", "param_names", "name", "initial_lr"}
# What the normalization of the peers adds to the norm. Ours does without: it takes gradients of any scale.
_EPS_LIMIT = 1e-3


class Converted(NamedTuple):
    """Groups, and the options that hold for the whole optimizer: `Muon(groups, **options)`."""

    groups: list[Group]
    options: dict[str, Any]


def convert_groups(param_groups: Sequence[Mapping[str, Any]], source: Source) -> Converted:
    """The groups of a peer, with their parameters, as groups of ours with the same meaning.

    A group of the peer becomes several where one of ours cannot say the same of all its parameters (kernels beside
    expert stacks, heads of several sizes). Iterates are bfloat16, as all of them have it. dion keeps the choice of its
    iteration in the optimizer, not in the groups: the options are those of its default, the Polar Express, whose
    coefficients differ from ours of that name in the guard against rounding (both bring singular values above 1e-3 to
    within 15 % of 1, but not to the same); pass `coefficients="quintic"` instead for `use_polar_express=False`. Where
    KellerJordan's takes a missing gradient for zero, a parameter without gradient is left alone here.
    """
    convert: Callable[[Mapping[str, Any], str], list[Group]] = _converter(source)
    groups = [new for number, group in enumerate(param_groups) for new in convert(group, f"{source} group {number}")]
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if source == "dion":
        return Converted(groups, options | {"coefficients": "polar_express", "steps": 5})
    if source == "kellerjordan":
        return Converted(groups, options | {"coefficients": "jordan", "steps": 5})
    named = {_named_coefficients(group, number) for number, group in enumerate(param_groups)}
    if len(named) > 1:
        raise UserError(f"the groups have several iterations, one optimizer here has one: {sorted(named)}")
    for name, steps in named:
        options |= {"coefficients": name, "steps": steps}
    return Converted(groups, options)


@torch.no_grad()
def load_state(
    optimizer: Muon,
    param_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    source: Source,
) -> None:
    """Copy a peer's state into `optimizer`, whose groups come from `convert_groups(param_groups, source)`.

    `state` is the peer's `state`, by parameter, or `state_dict()["state"]`, by number; `param_groups` are its groups
    with their parameters, in its own order. Momenta are rounded to the dtype they have here; whole tensors are cut as
    ours are. A parameter that has no state yet keeps zeros. Raises UserError for unknown entries, wrong shapes, and
    for KellerJordan's state of one rank of several, which has the momentum of that rank's matrices alone.
    """
    members = [(group, param) for group in param_groups for param in group["params"]]
    known = set(range(len(members))) | {param for _, param in members}
    if unknown := [key for key in state if key not in known]:
        raise UserError(f"the state has entries for {len(unknown)} parameters that the groups do not have")
    for number, (group, param) in enumerate(members):
        found = state.get(param) or state.get(number)
        if not found:
            if source == "kellerjordan" and state:
                raise UserError(
                    f"the state lacks parameter {number} {tuple(param.shape)}: it is that of one rank, and this "
                    "optimizer keeps each momentum on one rank only; merge the states of all ranks first"
                )
            continue
        own = optimizer.state[param]
        entries = _entries(dict(found), group, source, f"{source} state of parameter {number}")
        if set(entries) != set(own):
            raise UserError(
                f"{source} state of parameter {number} has {', '.join(sorted(entries))}, "
                f"but its group here keeps {', '.join(sorted(own))}"
            )
        for key, value in entries.items():
            own[key].copy_(_placed(value, own[key], f"{key} of parameter {number}"))


def _entries(found: dict[str, Any], group: Mapping[str, Any], source: Source, where: str) -> dict[str, Any]:
    """A peer's state of one parameter, under our names."""
    names = {"momentum_buffer": "momentum_buffer"}
    if source == "kellerjordan":
        names |= {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"}
    if source == "dion":
        names = {"momentum": "momentum_buffer"}
        if group.get("algorithm") == "adamw":
            names = {"momentum": "exp_avg", "variance": "exp_avg_sq", "step_dev": "step"}
            # Kept in the group by older versions.
            found.setdefault("step_dev", group.get("step", 0))
    if unknown := sorted(set(found) - set(names)):
        raise UserError(f"{where}: {', '.join(unknown)} has no equivalent here")
    return {names[key]: value for key, value in found.items()}


def _placed(value: Any, like: torch.Tensor, where: str) -> torch.Tensor:
    tensor: torch.Tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    if tensor.shape != like.shape:
        raise UserError(f"{where} has shape {tuple(tensor.shape)}, the one here {tuple(like.shape)}")
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def _converter(source: str) -> Callable[[Mapping[str, Any], str], list[Group]]:
    converters = {"torch": _from_torch, "kellerjordan": _from_kellerjordan, "dion": _from_dion}
    if source not in converters:
        raise UserError(f"unknown source {source!r}; known: {', '.join(converters)}")
    return converters[source]


def _from_torch(group: Mapping[str, Any], where: str) -> list[Group]:
    keys = {"lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"}
    _check_keys(group, keys, where)
    _check_eps(float(group.get("eps", 1e-7)), where)
    scalings: dict[str | None, Scaling] = {None: "jordan", "original": "jordan", "match_rms_adamw": "rms_adamw"}
    new = _muon_group(group, {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95})
    new |= {"nesterov": bool(group.get("nesterov", True)), "momentum_form": "ema", "cautious": False}
    new["scaling"] = _one_of(scalings, group.get("adjust_lr_fn"), f"{where}: adjust_lr_fn")
    return [new | {"params": _members(group)}]


def _named_coefficients(group: Mapping[str, Any], number: int) -> tuple[str, int]:
    """The name of a set that makes the constant coefficients of torch's iteration, and the number of steps."""
    triple = tuple(group.get("ns_coefficients", (3.4445, -4.7750, 2.0315)))
    steps = int(group.get("ns_steps", 5))
    for name, each in COEFFICIENTS.items():
        fits = steps >= each.fewest and (steps <= len(each.triples) or each.repeats) and each.preconditioner != "aol"
        if fits and steps >= 1 and coefficients(name, steps) == (triple,) * steps:
            return name, steps
    raise UserError(f"torch group {number}: ns_coefficients {triple} over {steps} steps are no named set here")


def _from_kellerjordan(group: Mapping[str, Any], where: str) -> list[Group]:
    if not group.get("use_muon", True):
        _check_keys(group, {"use_muon", "lr", "betas", "eps", "weight_decay"}, where)
        defaults = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        return [_adamw_group(group, defaults)]
    _check_keys(group, {"use_muon", "lr", "momentum", "weight_decay"}, where)
    common = _muon_group(group, {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.95})
    common |= {"nesterov": True, "momentum_form": "ema", "cautious": False, "scaling": "jordan"}
    for param in group["params"]:
        # A kernel is orthogonalized as (out, rest), but its scale there is that of its last two dims.
        if param.ndim > 4:
            raise UserError(f"{where}: a kernel {tuple(param.shape)} of more than 4 dims")
        if param.ndim == 4:
            theirs = update_scale("jordan", *param.shape[-2:])
            if theirs != update_scale("jordan", param.shape[0], param.shape[1:].numel()):
                raise UserError(
                    f"{where}: the kernel {tuple(param.shape)} is scaled by its last two dims there; no scaling here "
                    "does so. Give it a group of its own with another learning rate"
                )
    return _subgroups(group, common, lambda param: {"convolution": param.ndim > 3})


def _from_dion(group: Mapping[str, Any], where: str) -> list[Group]:
    keys = {"lr", "mu", "beta1", "beta2", "betas", "weight_decay", "cautious_wd", "algorithm", "step", "epsilon"}
    keys |= {"nesterov", "flatten", "adjust_lr", "num_heads", "split_sizes"}
    _check_keys(group, keys, where)
    algorithm, is_cautious = group.get("algorithm", "muon"), bool(group.get("cautious_wd", False))
    if algorithm == "adamw":
        if is_cautious and float(group.get("weight_decay", 0.01)):
            raise UserError(f"{where}: cautious_wd of an AdamW group has no equivalent here")
        betas = group.get("betas", (group.get("beta1", 0.9), group.get("beta2", 0.95)))
        given = {**group, "betas": betas, "eps": group.get("epsilon", 1e-8)}
        return [_adamw_group(given, {"lr": 0.01, "weight_decay": 0.01})]
    if algorithm != "muon":
        raise UserError(f"{where}: algorithm {algorithm!r} has no equivalent here; muon and adamw have")
    _check_eps(float(group.get("epsilon", 1e-8)), where)
    scalings: dict[str | None, Scaling] = {"spectral_norm": "spectral", "rms_norm": "rms_adamw"}
    common = _muon_group({**group, "momentum": group.get("mu", 0.95)}, {"lr": 0.01, "weight_decay": 0.01})
    common |= {"nesterov": bool(group.get("nesterov", False)), "momentum_form": "sum", "cautious": is_cautious}
    common["scaling"] = _one_of(scalings, group.get("adjust_lr", "spectral_norm"), f"{where}: adjust_lr")
    is_flat, num_heads, sizes = bool(group.get("flatten")), group.get("num_heads") or 1, group.get("split_sizes")
    for param in group["params"]:
        if param.ndim > 3 and not is_flat:
            raise UserError(f"{where}: {tuple(param.shape)} as a stack of more than 3 dims has no equivalent here")
        if num_heads > 1 and (param.ndim != 2 or param.shape[0] % num_heads):
            raise UserError(f"{where}: {num_heads} heads do not divide {tuple(param.shape)}")

    def kind(param: torch.Tensor) -> dict[str, Any]:
        split = Split(tuple(sizes)) if sizes else None
        if num_heads > 1:
            split = Split((param.shape[0] // num_heads,), groups=num_heads, separate_groups=True)
        return {"convolution": is_flat, "split": split}

    return _subgroups(group, common, kind)


def _muon_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> Group:
    values = {key: float({**defaults, **group}[key]) for key in ("lr", "momentum", "weight_decay")}
    return {**_neutral(group), "rule": "muon", **values, "split": None, "convolution": False}


def _adamw_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> Group:
    given = {**defaults, **group}
    values = {key: float(given[key]) for key in ("lr", "eps", "weight_decay")}
    betas = tuple(float(beta) for beta in given["betas"])
    return {**_neutral(group), "rule": "adamw", "params": _members(group), **values, "betas": betas}


def _neutral(group: Mapping[str, Any]) -> Group:
    return {key: group[key] for key in ("name", "initial_lr") if key in group}


def _members(group: Mapping[str, Any]) -> list[Any]:
    """The parameters, each with its name where the group knows them."""
    names = group.get("param_names")
    return list(zip(names, group["params"], strict=True)) if names else list(group["params"])


def _subgroups(group: Mapping[str, Any], common: Group, kind: Callable[[torch.Tensor], dict[str, Any]]) -> list[Group]:
    """The group, cut where `kind` differs; parameters of one kind stay in their order."""
    members: list[tuple[dict[str, Any], list[Any]]] = []
    for param, member in zip(group["params"], _members(group), strict=True):
        own = kind(param)
        if (found := next((params for other, params in members if other == own), None)) is None:
            members.append((own, found := []))
        found.append(member)
    groups = [{**common, **own, "params": params} for own, params in members]
    if "name" in common and len(groups) > 1:
        for number, new in enumerate(groups):
            new["name"] = f"{common['name']}.{number}"
    return groups


def _check_keys(group: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(group) - known - _NEUTRAL):
        raise UserError(f"{where}: {', '.join(unknown)} has no equivalent here")


def _check_eps(eps: float, where: str) -> None:
    if eps > _EPS_LIMIT:
        raise UserError(f"{where}: an epsilon of {eps} damps updates with small gradients; nothing here does so")


def _one_of(known: Mapping[str | None, Scaling], value: str | None, where: str) -> Scaling:
    if value not in known:
        raise UserError(f"{where}={value!r} has no equivalent here; known: {', '.join(map(str, known))}")
    return known[value]
