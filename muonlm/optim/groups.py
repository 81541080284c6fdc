"""What a parameter group of `Muon` must look like, and its options."""

from __future__ import annotations

import math
from typing import Any

import torch

from muonlm.config.errors import UserError
from muonlm.optim.layout import Index, as_stack
from muonlm.optim.scaling import SCALINGS
from muonlm_kernels import coefficients as named_coefficients

_RULES = ("muon", "adamw")
_NON_FINITE = ("raise", "skip")


def check_options(coefficients: str, steps: int, non_finite: str, **numbers: float) -> None:
    """Raise UserError for options of the whole optimizer that cannot be."""
    try:
        named_coefficients(coefficients, steps)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_numbers(**numbers)
    if non_finite not in _NON_FINITE:
        raise UserError(f"non_finite is {' or '.join(_NON_FINITE)}, not {non_finite!r}")


def check_numbers(**numbers: float) -> None:
    """Raise UserError for what is no number, negative or not finite, by its name."""
    for key, value in numbers.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{key}={value!r}: it must be a number, and not negative")


def check_group(group: dict[str, Any], number: int) -> list[str]:
    """Names of a group's parameters, the `number`-th group counted from 0. Raises UserError for what cannot be."""
    where = f"group {group.get('name', number)}"
    names: list[str] = group.get("param_names") or [f"{where}, number {i}" for i in range(len(group["params"]))]
    if group["rule"] not in _RULES:
        raise UserError(f"{where}: unknown rule {group['rule']!r} of a parameter group; known: {', '.join(_RULES)}")
    _check_numbers(group, where)
    if group["rule"] == "adamw":
        return names
    if group["scaling"] not in SCALINGS:
        raise UserError(f"{where}: unknown scaling {group['scaling']!r}; known: {', '.join(SCALINGS)}")
    if group["momentum_form"] not in ("ema", "sum"):
        raise UserError(f"{where}: unknown momentum_form {group['momentum_form']!r}; known: ema, sum")
    wrong = [
        f"{name} {tuple(param.shape)}"
        for name, param in zip(names, group["params"], strict=True)
        if param.ndim < 2 or (param.ndim > 3 and not group["convolution"]) or not param.is_floating_point()
    ]
    if wrong:
        raise UserError(
            "Muon takes matrices (out, in), stacks of them (experts, out, in), and with convolution=True kernels "
            f"(out, in, ...); these are none: {', '.join(wrong)}. Put them in a group with rule='adamw'"
        )
    return names


def _check_numbers(group: dict[str, Any], where: str) -> None:
    beta1, beta2 = group["betas"]
    values = {"momentum": group["momentum"], "betas[0]": beta1, "betas[1]": beta2}
    wrong = [f"{key}={value}" for key, value in values.items() if not 0 <= float(value) < 1]
    wrong += [f"{key}={group[key]}" for key in ("lr", "weight_decay", "eps") if not 0 <= float(group[key]) < math.inf]
    if wrong:
        raise UserError(f"{where}: {', '.join(wrong)}; momentum and betas lie in [0, 1), the others are not negative")


def stack_shape(param: torch.Tensor, *, is_stack: bool) -> Index:
    """A parameter of any shape as (E, out, in); vectors are one row."""
    return as_stack(param.shape, is_stack=is_stack) if param.ndim >= 2 else (1, 1, param.numel())
