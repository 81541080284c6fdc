"""Parameters sharded in every way, on real ranks and on one process, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muonlm.optim.muon import Muon
from muonlm.optim.pieces import Split

Shapes = list[tuple[int, ...]]
Place = Callable[[list[nn.Parameter]], list[nn.Parameter]]


class Bag(nn.Module):
    """Parameters without a forward pass."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.values = nn.ParameterList(params)


def fsdp(params: list[nn.Parameter], mesh: DeviceMesh) -> list[nn.Parameter]:
    """Sharded by FSDP2, unpatched; a mesh of two axes is HSDP."""
    bag = Bag(params)
    fully_shard(bag, mesh=mesh)
    return list(bag.values)


def tensor_parallel(params: list[nn.Parameter], mesh: DeviceMesh) -> list[nn.Parameter]:
    """Column- and row-parallel by turns."""
    return [
        nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(i % 2)]), requires_grad=True)
        for i, p in enumerate(params)
    ]


def placed(params: list[nn.Parameter], layout: str) -> list[nn.Parameter]:
    """`params`, the same on every rank, sharded as `layout` says."""
    world = dist.get_world_size()
    match layout.split(":"):
        case ["replicated"]:
            return params
        case ["fsdp"]:
            return fsdp(params, init_device_mesh("cpu", (world,)))
        case ["hsdp"]:
            return fsdp(params, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
        case ["tp"]:
            return tensor_parallel(params, init_device_mesh("cpu", (world,)))
        case ["fsdp-tp"]:
            mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
            return fsdp(tensor_parallel(params, mesh["tp"]), mesh["dp"])
        case ["cut", dim]:
            mesh = init_device_mesh("cpu", (world,))
            return [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(int(dim))])) for p in params]
        case ["mixed"]:
            mesh = init_device_mesh("cpu", (world,))
            kinds = [Shard(0), Replicate(), Shard(1)]
            return [nn.Parameter(distribute_tensor(p.detach(), mesh, [kinds[i % 3]])) for i, p in enumerate(params)]
    raise ValueError(layout)


def set_grads(params: list[nn.Parameter], step: int, first: list[torch.Tensor], layout: str) -> None:
    """Gradients that depend on the (initial) weights and the step alone, cut as the parameters are."""
    generator = torch.Generator().manual_seed(100 + step)
    grads = [nn.Parameter(torch.randn(w.shape, generator=generator) * 0.01 + 0.1 * w) for w in first]
    for param, grad in zip(params, placed(grads, layout) if dist.is_initialized() else grads, strict=True):
        param.grad = grad.detach()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A logical tensor, whole."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run_steps(
    shapes: Shapes,
    layout: str,
    steps: int = 3,
    group: dict[str, Any] | None = None,
    splits: list[Split] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A few steps of Muon on parameters of `shapes`; weights, momenta, and what the optimizer did, on this rank.

    `splits` gives each parameter a group and a split of its own.
    """
    from muonlm.dist import collectives

    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]
    initial = [p.detach().clone() for p in params]
    params = placed(params, layout) if dist.is_initialized() else params
    groups = [{"params": params, **(group or {})}]
    if splits is not None:
        groups = [{"params": [param], "split": split} for param, split in zip(params, splits, strict=True)]
    optimizer = Muon(groups, lr=0.05, momentum=0.9, weight_decay=0.1, **options)
    collectives.reset_counters()
    for step in range(steps):
        set_grads(params, step, initial, layout)
        optimizer.step()
    counts = collectives.counters()
    return {
        "weights": [full(p) for p in params],
        "momenta": [full(optimizer.state[p]["momentum_buffer"]) for p in params],
        "counts": counts,
        "plan": optimizer.plan(),
    }


@pytest.fixture
def layouts() -> SimpleNamespace:
    """`placed`, `set_grads` and `full`, for tests that drive an optimizer themselves."""
    return SimpleNamespace(placed=placed, set_grads=set_grads, full=full)


@pytest.fixture
def steps_on(run_ranks: Callable[..., list[Any]]) -> Callable[..., list[dict[str, Any]]]:
    """`steps_on(world_size, shapes, layout, **options)`: `run_steps` on real ranks; one process without ranks."""

    def run(world_size: int, shapes: Shapes, layout: str, **options: Any) -> list[dict[str, Any]]:
        if world_size == 1:
            return [run_steps(shapes, layout, **options)]
        return run_ranks(lambda rank, size: run_steps(shapes, layout, **options), world_size)

    return run
