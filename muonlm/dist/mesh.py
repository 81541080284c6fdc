"""Where this rank stands among replicas, shards and tensor-parallel ranks, and the device mesh of these axes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from muonlm.config.ranks import RankGrid, rank_grid
from muonlm.config.schema import TrainConfig
from muonlm.dist.process import World

AXES = ("replicate", "shard", "tensor")
EXPERT_AXES = ("replicate", "expert_shard", "expert", "tensor")


@dataclass(frozen=True)
class Mesh:
    """The arrangement of the ranks as seen from one of them.

    `devices` has the axes "replicate", "shard" and "tensor", with expert parallelism "expert_shard" and "expert" too,
    which "shard" is made of; it is None where ranks do no more than average gradients of whole models, and the process
    group of all ranks is all they need.
    """

    grid: RankGrid
    rank: int
    device: torch.device
    devices: DeviceMesh | None = None

    @property
    def data_rank(self) -> int:
        """Which share of the sequences this rank reads; ranks of one tensor group read the same."""
        return self.rank // self.grid.tensor

    @property
    def data_size(self) -> int:
        """Number of shares."""
        return self.grid.data

    @property
    def tensor(self) -> DeviceMesh | None:
        """The ranks that share the matrices of each layer with this one; None without tensor parallelism."""
        return self.devices["tensor"] if self.devices is not None and self.grid.tensor > 1 else None

    @property
    def expert(self) -> DeviceMesh | None:
        """The ranks that hold other experts than this one; None without expert parallelism."""
        return self.devices["expert"] if self.devices is not None and self.grid.expert > 1 else None

    @property
    def expert_and_tensor(self) -> DeviceMesh | None:
        """Both axes, where there are both."""
        both = self.devices is not None and self.grid.expert > 1 and self.grid.tensor > 1
        return self.devices["expert", "tensor"] if both and self.devices is not None else None

    @property
    def expert_sharded(self) -> DeviceMesh | None:
        """As `sharded`, for experts under expert parallelism: the ranks that hold the same ones; None without it."""
        if self.devices is None or self.grid.expert == 1:
            return None
        axes = ("replicate", "expert_shard") if self.grid.replicate > 1 else ("expert_shard",)
        return self.devices[axes]

    @property
    def sharded(self) -> DeviceMesh | None:
        """The ranks over which FSDP2 cuts this rank's parameters, with an axis of replicas where there are any.

        None where there is nothing to cut. Replicas of a tensor-parallel model come here too, one shard each.
        """
        replicate, shard, tensor, _ = self.grid
        if self.devices is None or (shard == 1 and (replicate == 1 or tensor == 1)):
            return None
        with warnings.catch_warnings():  # of slices of a flattened axis: FSDP2 needs them, and torch has no other yet
            warnings.filterwarnings("ignore", "Slicing a flattened dim")
            return self.devices["replicate", "shard"] if replicate > 1 else self.devices["shard"]


def make_mesh(config: TrainConfig, world: World) -> Mesh:
    """Arrange the ranks as `config.dist` asks; called by all ranks.

    Collectives: those that make the process groups of the axes, when there is more to do than averaging gradients.
    Raises UserError, on all ranks, when their number does not divide into what is asked for.
    """
    grid = rank_grid(config, world.size)
    if grid.shard == grid.tensor == 1:
        return Mesh(grid, world.rank, world.device)
    replicate, shard, tensor, expert = grid
    if expert > 1:
        sizes = (replicate, shard // expert, expert, tensor)
        devices = init_device_mesh(world.device.type, sizes, mesh_dim_names=EXPERT_AXES)
        devices["expert_shard", "expert"]._flatten("shard")
    else:
        devices = init_device_mesh(world.device.type, (replicate, shard, tensor), mesh_dim_names=AXES)
    # torch gives new groups its own timeout, of up to half an hour, rather than that of the group of all ranks.
    for group in devices.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=config.dist.timeout_s), group)
    return Mesh(grid, world.rank, world.device, devices)
