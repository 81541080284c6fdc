"""Weights on real ranks: parameters and gradients of given shapes, sharded in the ways that training shards them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from muonlm.bench.zoo import Weight
from muonlm.config.errors import UserError

LAYOUTS = {
    "replicated": "every rank holds everything, as with DistributedDataParallel",
    "fsdp": "FSDP2 over all ranks",
    "hsdp": "FSDP2 within each of two replicas",
    "tp": "tensor parallelism over all ranks, rows and columns",
    "fsdp-tp": "FSDP2 over two halves, tensor parallelism within them",
}


@dataclass(frozen=True)
class Grid:
    """How ranks are arranged for a layout: `mesh` is None where every rank holds everything.

    Fields:
        layout: a key of LAYOUTS.
        shards, replicas: over how many ranks a weight is cut, and how many copies there are.
        mesh: of torch.
    """

    layout: str
    shards: int
    replicas: int
    mesh: DeviceMesh | None

    @property
    def cut(self) -> DeviceMesh | None:
        """The axis that cuts the weights, where one axis does; a peer that knows only such is given this."""
        return self.mesh["shard"] if self.mesh is not None and self.layout == "hsdp" else self.mesh


def check_layout(layout: str, num_ranks: int) -> None:
    """Raise UserError where `layout` does not fit the number of ranks."""
    if layout in ("hsdp", "fsdp-tp") and (num_ranks < 4 or num_ranks % 2):
        raise UserError(f"layout {layout} needs an even number of ranks, at least 4, not {num_ranks}")
    if layout != "replicated" and num_ranks < 2:
        raise UserError(f"layout {layout} needs at least 2 ranks; with one there is only replicated")


def make_grid(layout: str, device: torch.device) -> Grid:
    """Arrange the ranks of the default process group. Communicates where torch does to make a mesh."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    check_layout(layout, ranks)
    match layout:
        case "replicated":
            return Grid(layout, 1, ranks, None)
        case "hsdp":
            mesh = init_device_mesh(device.type, (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
            return Grid(layout, ranks // 2, 2, mesh)
        case "fsdp-tp":
            mesh = init_device_mesh(device.type, (2, ranks // 2), mesh_dim_names=("shard", "tp"))
            return Grid(layout, ranks, 1, mesh)
    return Grid(layout, ranks, 1, init_device_mesh(device.type, (ranks,)))


class _Bag(nn.Module):
    """Parameters without a forward pass."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.values = nn.ParameterList(params)


def place(weights: Sequence[Weight], grid: Grid, device: torch.device, *, seed: int, std: float) -> list[nn.Parameter]:
    """Normal values for `weights`, the same on every rank for a seed, kept as the grid says."""
    generator = torch.Generator().manual_seed(seed)
    params = [
        nn.Parameter(torch.empty(weight.shape).normal_(0.0, std, generator=generator).to(device)) for weight in weights
    ]
    mesh = grid.mesh
    if mesh is None:
        return params
    if grid.layout in ("tp", "fsdp-tp"):
        axis = mesh if grid.layout == "tp" else mesh["tp"]
        params = [
            nn.Parameter(distribute_tensor(param.detach(), axis, [_tensor_parallel(weight)]))
            for weight, param in zip(weights, params, strict=True)
        ]
    if grid.layout == "tp":
        return params
    bag = _Bag(params)
    fully_shard(bag, mesh=mesh["shard"] if grid.layout == "fsdp-tp" else mesh)
    return list(bag.values)


def _tensor_parallel(weight: Weight) -> Shard:
    """Experts go to ranks whole."""
    return Shard(0 if weight.experts > 1 or weight.cut == "rows" else 1)
