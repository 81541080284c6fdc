"""Muon as a `torch.optim.Optimizer`: momentum, orthogonalization through the exchange, and AdamW for the rest.

Update of a hidden matrix W (out, in) with gradient G (K. Jordan, "Muon", 2024; scaling rules: `update_scale`):

    M <- mu M + (1 - mu) G          momentum
    U <- (1 - mu) G + mu M          Nesterov, or U = M
    O <- newton_schulz(U)           nearest semi-orthogonal matrix, on the owner rank
    W <- (1 - lr wd) W - lr scale O

The momentum is kept on every rank, as the parameters are, so that state_dict() is the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch.optim.adamw import adamw

from muonlm.config.errors import UserError
from muonlm.optim.exchange import ReplicatedExchange
from muonlm_kernels import newton_schulz

Scaling = Literal["jordan", "spectral", "rms_adamw"]


def update_scale(scaling: Scaling, out_features: int, in_features: int) -> float:
    """Factor on the orthogonal update of an (out, in) matrix.

    jordan: sqrt(max(1, out / in)) (K. Jordan 2024). spectral: sqrt(out / in), so that the update has unit
    RMS-to-RMS operator norm (G. Yang et al., arXiv 2310.17813). rms_adamw: 0.2 sqrt(max(out, in)), the RMS that
    AdamW updates show (J. Liu et al., "Muon is scalable", arXiv 2502.16982).
    """
    match scaling:
        case "jordan":
            return math.sqrt(max(1.0, out_features / in_features))
        case "spectral":
            return math.sqrt(out_features / in_features)
        case "rms_adamw":
            return 0.2 * math.sqrt(max(out_features, in_features))
    raise ValueError(f"unknown scaling {scaling!r}; known: jordan, spectral, rms_adamw")


class Muon(torch.optim.Optimizer):
    """Muon on matrices; groups with `rule="adamw"` get AdamW in the same object and state_dict.

    `params` are parameters, named parameters or groups, as for any torch optimizer; group keys override the defaults
    (an AdamW group without `lr` and `weight_decay` of its own has Muon's).
    Parameters of muon groups must be two-dimensional, else UserError. `coefficients`, `steps`, `dtype` and
    `compensated` are those of `muonlm_kernels.newton_schulz` and hold for the whole optimizer. State is allocated at
    construction: `momentum_buffer` in the parameter's shape and dtype for Muon; `exp_avg`, `exp_avg_sq`, `step` for
    AdamW. Under a process group the Newton-Schulz work is split over the ranks and one all_gather a step brings the
    updates together; gradients must be averaged already (DDP). A parameter without gradient is left alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        scaling: Scaling = "rms_adamw",
        coefficients: str = "polar_express",
        steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
        compensated: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "rule": "muon",
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "scaling": scaling,
            "betas": betas,
            "eps": eps,
        }
        self._orthogonalize = partial(
            newton_schulz, coefficients=coefficients, steps=steps, dtype=dtype, compensated=compensated
        )
        self._dtype, self._steps = dtype, steps
        self._exchange: ReplicatedExchange | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state; the work is assigned anew at the next step."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group)
        for param in group["params"]:
            state = self.state[param]
            if group["rule"] == "muon":
                state["momentum_buffer"] = torch.zeros_like(param)
            else:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        self._exchange = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter. Collectives: one all_gather of the updates when there are ranks."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon_step([group for group in self.param_groups if group["rule"] == "muon"])
        for group in self.param_groups:
            if group["rule"] == "adamw":
                self._adamw_step(group)
        return loss

    def _muon_step(self, groups: list[dict[str, Any]]) -> None:
        """All Muon groups share one exchange, so that the work is balanced over everything there is."""
        if not groups:
            return
        updates = [update for group in groups for update in self._momentum(group)]
        if self._exchange is None:
            self._exchange = ReplicatedExchange([(u.shape[0], u.shape[1]) for u in updates], self._steps)
        results = iter(self._exchange.run(updates, self._orthogonalize, self._dtype))
        for group in groups:
            lr = float(group["lr"])
            for param in group["params"]:
                orthogonal = next(results)
                if param.grad is None:
                    continue
                if group["weight_decay"]:
                    param.mul_(1 - lr * group["weight_decay"])
                param.add_(orthogonal, alpha=-lr * update_scale(group["scaling"], *param.shape))

    def _momentum(self, group: dict[str, Any]) -> list[torch.Tensor]:
        """Advance the momentum of a group and return what is to be orthogonalized, in the group's order."""
        params, mu = group["params"], group["momentum"]
        buffers: list[torch.Tensor] = [self.state[p]["momentum_buffer"] for p in params]
        live = [(b, p.grad) for b, p in zip(buffers, params, strict=True) if p.grad is not None]
        if live:
            torch._foreach_lerp_([b for b, _ in live], [g for _, g in live], 1 - mu)
        if not group["nesterov"]:
            return buffers
        return [b if p.grad is None else torch.lerp(p.grad, b, mu) for b, p in zip(buffers, params, strict=True)]

    def _adamw_step(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _check_group(group: dict[str, Any]) -> None:
    if group["rule"] not in ("muon", "adamw"):
        raise UserError(f"unknown rule {group['rule']!r} of a parameter group; known: muon, adamw")
    if group["rule"] == "adamw":
        return
    names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
    wrong = [f"{n} {tuple(p.shape)}" for n, p in zip(names, group["params"], strict=True) if p.ndim != 2]
    if wrong:
        raise UserError(
            f"Muon takes two-dimensional parameters; these are not: {', '.join(wrong)}. "
            "Put them in a group with rule='adamw'"
        )
