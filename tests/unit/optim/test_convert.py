"""Other implementations' groups and states, taken over in the middle of a training, go on as they would have there.

torch.optim.Muon is the real one; KellerJordan's and dion's updates are written down here from their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.optim.convert import convert_groups, load_state
from muonlm.optim.muon import Muon
from muonlm_kernels import coefficients

SHAPES: list[tuple[int, ...]] = [(32, 32), (48, 16), (16, 40)]
Params = list[nn.Parameter]
FP32 = {"dtype": torch.float32}


def parameters(shapes: list[tuple[int, ...]] = SHAPES) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def set_gradients(params: Params, step: int) -> None:
    """Gradients that depend on the weights, so that a wrong step is carried on into the next."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 0.01 + 0.1 * param.detach()


def iterate(x: torch.Tensor, triples: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    """Newton-Schulz on each matrix of a stack; in fp32, so that other roundings than ours do not matter."""
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Adam:
    """Adam with decoupled decay on one tensor, as KellerJordan's and dion's auxiliary one."""

    def __init__(self, like: torch.Tensor) -> None:
        self.first, self.second, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def step(self, param: nn.Parameter, lr: float, betas: tuple[float, float], eps: float, decay: float) -> None:
        self.count += 1
        self.first = betas[0] * self.first + (1 - betas[0]) * param.grad
        self.second = betas[1] * self.second + (1 - betas[1]) * param.grad**2
        ratio = self.first / (1 - betas[0] ** self.count)
        ratio = ratio / ((self.second / (1 - betas[1] ** self.count)).sqrt() + eps)
        param.data = param.data * (1 - lr * decay) - lr * ratio


class Peer:
    """KellerJordan's or dion's optimizer: groups and state as they keep them, updates by their formulas."""

    def __init__(self, groups: list[dict[str, Any]], kind: str) -> None:
        self.param_groups, self.kind = groups, kind
        self.momenta = {p: torch.zeros_like(p) for g in groups for p in g["params"]}
        self.adams = {p: Adam(p) for g in groups for p in g["params"]}

    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if group.get("use_muon", group.get("algorithm") == "muon"):
                    self.muon(group, param)
                else:
                    betas = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
                    eps = group["eps"] if "eps" in group else group["epsilon"]
                    self.adams[param].step(param, group["lr"], betas, eps, group["weight_decay"])

    def muon(self, group: dict[str, Any], param: nn.Parameter) -> None:
        grad, weight = param.grad, param.detach()
        assert grad is not None
        if self.kind == "kellerjordan":
            mu = group["momentum"]
            momentum = self.momenta[param] = mu * self.momenta[param] + (1 - mu) * grad
            update = (1 - mu) * grad + mu * momentum
            update = iterate(update.flatten(1) if update.ndim == 4 else update, coefficients("jordan", 5))
            factor = math.sqrt(max(1, param.shape[-2] / param.shape[-1]))
            new = weight - group["lr"] * group["weight_decay"] * weight
        else:
            mu = group["mu"]
            momentum = self.momenta[param] = mu * self.momenta[param] + grad
            update = mu * momentum + grad if group["nesterov"] else momentum
            flat = update.flatten(1) if group["flatten"] else update
            heights = list(group.get("split_sizes", ())) or [flat.shape[-2] // group.get("num_heads", 1)]
            blocks = flat.split(heights if len(heights) > 1 else heights[0], dim=-2)
            adjusted = []
            for block in blocks:
                rows, cols = block.shape[-2:]
                by = {"spectral_norm": math.sqrt(rows / cols), "rms_norm": 0.2 * math.sqrt(max(rows, cols))}
                adjusted.append(by[group["adjust_lr"]] * iterate(block, coefficients("quintic", 5)).float())
            update, factor = torch.cat(adjusted, dim=-2), 1.0
            is_decayed = weight * update.view_as(weight) >= 0 if group["cautious_wd"] else 1.0
            new = weight - group["lr"] * group["weight_decay"] * weight * is_decayed
        param.data = new - group["lr"] * factor * update.float().reshape(weight.shape)

    def state(self, names: Callable[[dict[str, Any], nn.Parameter], dict[str, Any]]) -> dict[Any, Any]:
        return {p: names(g, p) for g in self.param_groups for p in g["params"]}


def go_on_with_both(peer: Any, source: Any, state: Any, options: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """Convert, train both for three steps; for each parameter by how much they differ, relative to how far it moved."""
    theirs = [p for group in peer.param_groups for p in group["params"]]
    copies = {id(p): nn.Parameter(p.detach().clone()) for p in theirs}
    start = [p.detach().clone() for p in theirs]
    mine = [copies[id(p)] for p in theirs]
    groups = [{**group, "params": [copies[id(p)] for p in group["params"]]} for group in peer.param_groups]
    converted = convert_groups(groups, source)
    ours = Muon(converted.groups, **{**converted.options, **options})
    by_copy = (
        {copies[id(p)]: entries for p, entries in state.items()}
        if isinstance(next(iter(state)), nn.Parameter)
        else state
    )
    load_state(ours, groups, by_copy, source)
    for step in range(3, 6):
        for params, optimizer in ((mine, ours), (theirs, peer)):
            set_gradients(params, step)
            optimizer.step()
    for a, b, initial in zip(mine, theirs, start, strict=True):
        yield ((a - b).norm() / (b - initial).norm()).item(), (b - initial).norm().item()


@pytest.mark.parametrize("by_number", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjust_lr_fn": "match_rms_adamw", "nesterov": False, "momentum": 0.8, "weight_decay": 0.3},
        {"adjust_lr_fn": "original", "ns_steps": 7},
    ],
)
def test_torch_muon_goes_on(options, by_number) -> None:
    params = parameters()
    peer = torch.optim.Muon([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=0.02, **options)
    for step in range(3):
        set_gradients(params, step)
        peer.step()
    state = peer.state_dict()["state"] if by_number else peer.state
    for difference, moved in go_on_with_both(peer, "torch", dict(state), {}):
        assert moved > 0.01
        assert difference < 2**-5  # both round iterates to bfloat16


def test_momenta_of_torch_are_taken_over_exactly() -> None:
    params = parameters()
    peer = torch.optim.Muon(params)
    for step in range(3):
        set_gradients(params, step)
        peer.step()
    converted = convert_groups(peer.param_groups, "torch")
    ours = Muon(converted.groups, **converted.options)
    load_state(ours, peer.param_groups, peer.state, "torch")
    for param in params:
        assert torch.equal(ours.state[param]["momentum_buffer"], peer.state[param]["momentum_buffer"])
        assert ours.state[param]["momentum_buffer"] is not peer.state[param]["momentum_buffer"]


def test_kellerjordan_goes_on() -> None:
    params = parameters([*SHAPES, (3, 12, 8), (8, 2, 3, 3), (10,), (6, 5)])
    muon = {"params": params[:5], "use_muon": True, "lr": 0.03, "momentum": 0.9, "weight_decay": 0.2}
    adam = {"params": params[5:], "use_muon": False, "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10}
    peer = Peer([muon, {**adam, "weight_decay": 0.1}], "kellerjordan")
    for step in range(3):
        set_gradients(params, step)
        peer.step()
    for group in peer.param_groups:
        del group["step"]

    def names(group: dict[str, Any], param: nn.Parameter) -> dict[str, Any]:
        if group["use_muon"]:
            return {"momentum_buffer": peer.momenta[param]}
        adam = peer.adams[param]
        return {"exp_avg": adam.first, "exp_avg_sq": adam.second, "step": adam.count}

    differences = list(go_on_with_both(peer, "kellerjordan", peer.state(names), FP32))
    assert all(difference < 1e-4 for difference, _ in differences[:5])
    assert all(difference < 1e-5 for difference, _ in differences[5:])


@pytest.mark.parametrize(
    ("group", "shapes"),
    [
        ({}, SHAPES),
        ({"nesterov": True, "adjust_lr": "rms_norm", "cautious_wd": True, "weight_decay": 0.5}, SHAPES),
        ({"flatten": True}, [(8, 2, 3, 3), (6, 5, 2)]),
        ({}, [(3, 12, 8)]),
        ({"num_heads": 4}, [(16, 24), (32, 24)]),
        ({"split_sizes": (16, 4, 4), "adjust_lr": "rms_norm"}, [(24, 20)]),
    ],
)
def test_dion_goes_on(group, shapes) -> None:
    params = parameters([*shapes, (10,)])
    common = {"lr": 0.03, "mu": 0.9, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1, "cautious_wd": False}
    common |= {"step": 0, "epsilon": 1e-8, "nesterov": False, "flatten": False, "adjust_lr": "spectral_norm"}
    muon = {**common, "params": params[:-1], "algorithm": "muon", **group}
    peer = Peer([muon, {**common, "params": params[-1:], "algorithm": "adamw"}], "dion")
    for step in range(3):
        set_gradients(params, step)
        peer.step()

    def names(group: dict[str, Any], param: nn.Parameter) -> dict[str, Any]:
        if group["algorithm"] == "muon":
            return {"momentum": peer.momenta[param]}
        adam = peer.adams[param]
        return {"momentum": adam.first, "variance": adam.second, "step_dev": torch.tensor(float(adam.count))}

    differences = list(go_on_with_both(peer, "dion", peer.state(names), FP32 | {"coefficients": "quintic"}))
    assert all(difference < 1e-4 for difference, _ in differences[:-1])
    assert differences[-1][0] < 1e-5


W = (6, 4)


@pytest.mark.parametrize(
    ("source", "group", "shape", "message"),
    [
        ("dion", {"algorithm": "lion"}, W, "dion group 0: algorithm 'lion' has no equivalent"),
        ("dion", {"algorithm": "muon", "adjust_lr": None}, W, "adjust_lr=None has no equivalent"),
        ("dion", {"algorithm": "adamw", "cautious_wd": True}, W, "cautious_wd of an AdamW group"),
        ("dion", {"rank_fraction": 0.25}, W, "rank_fraction has no equivalent"),
        ("dion", {"epsilon": 0.1}, W, "an epsilon of 0.1"),
        ("dion", {}, (2, 3, 4, 5), r"\(2, 3, 4, 5\) as a stack"),
        ("dion", {"num_heads": 4}, W, "4 heads do not divide"),
        ("torch", {"ns_coefficients": (3.0, -3.2, 1.2)}, W, "no named set"),
        ("torch", {"adjust_lr_fn": "spectral"}, W, "adjust_lr_fn='spectral' has no equivalent"),
        ("torch", {"foreach": True}, W, "torch group 0: foreach has no equivalent"),
        ("kellerjordan", {"use_muon": True, "nesterov": False}, W, "nesterov has no equivalent"),
        ("kellerjordan", {"use_muon": False, "amsgrad": True}, W, "amsgrad has no equivalent"),
        ("kellerjordan", {"use_muon": True}, (64, 2, 3, 3), r"kernel \(64, 2, 3, 3\) is scaled by its last two"),
        ("flash", {}, W, "unknown source 'flash'; known: torch, kellerjordan, dion"),
    ],
)
def test_what_has_no_equivalent_is_named(source, group, shape, message) -> None:
    with pytest.raises(UserError, match=message):
        convert_groups([{"params": [nn.Parameter(torch.ones(shape))], "lr": 0.1, **group}], source)


def test_groups_with_two_iterations_are_refused() -> None:
    groups = [{"params": parameters(), "ns_steps": steps} for steps in (5, 6)]
    with pytest.raises(UserError, match=r"\('jordan', 5\), \('jordan', 6\)"):
        convert_groups(groups, "torch")


def test_names_and_scheduler_bases_are_kept() -> None:
    named = [("a", nn.Parameter(torch.ones(4, 2))), ("b", nn.Parameter(torch.ones(2, 2, 3, 3)))]
    group = {"params": [p for _, p in named], "param_names": ["a", "b"], "name": "hidden", "initial_lr": 0.4}
    ours = Muon(convert_groups([{**group, "lr": 0.1}], "kellerjordan").groups)
    assert [g["param_names"] for g in ours.param_groups] == [["a"], ["b"]]
    assert [g["name"] for g in ours.param_groups] == ["hidden.0", "hidden.1"]
    assert [g["initial_lr"] for g in ours.param_groups] == [0.4, 0.4]
    assert [g["convolution"] for g in ours.param_groups] == [False, True]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({0: {"momentum_buffer": torch.ones(6, 4)}}, "lacks parameter 1"),
        ({7: {"momentum_buffer": torch.ones(6, 4)}}, "1 parameters that the groups do not have"),
        ({0: {"momentum_buffer": torch.ones(4, 6)}}, r"shape \(4, 6\), the one here \(6, 4\)"),
        ({0: {"momentum_buffer": torch.ones(6, 4), "variance": torch.ones(())}}, "variance has no equivalent"),
        ({0: {"exp_avg": torch.ones(6, 4)}}, "has exp_avg, but its group here keeps momentum_buffer"),
    ],
)
def test_states_that_do_not_fit_are_refused(state, message) -> None:
    groups = [{"params": parameters([W, W]), "use_muon": True}]
    ours = Muon(convert_groups(groups, "kellerjordan").groups)
    with pytest.raises(UserError, match=message):
        load_state(ours, groups, state, "kellerjordan")
