"""What this process keeps of a parameter, whatever shards it: all that an engine has to tell the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.optim.groups import stack_shape
from muonlm.optim.layout import Index, Layout, MeshShard, mesh_layout, replicated


class Shard(Protocol):
    """A parameter as one rank sees it.

    `layout` says who holds what, in ranks of the process group; `pinned` that its matrices are to be computed where
    they lie whole. `local()` and `grad()` have one shape; either is empty where this rank holds nothing, and `grad()`
    is None where there is no gradient.
    """

    name: str
    layout: Layout
    pinned: bool

    def local(self) -> torch.Tensor:
        """The values on this rank, to be updated in place."""

    def grad(self) -> torch.Tensor | None:
        """The averaged gradient of these values."""

    def state_like(self) -> torch.Tensor:
        """What optimizer state is shaped and sharded like."""

    def local_state(self, state: torch.Tensor) -> torch.Tensor:
        """The part of such a state that belongs to `local()`."""

    def logical(self, state: torch.Tensor) -> Any:
        """Such a state as torch.distributed.checkpoint saves and loads it in place: whole, wherever its parts lie."""


class Sharding(Protocol):
    """An engine that keeps parameters in its own way, as ZeRO's buckets do."""

    def shard(self, name: str, param: torch.Tensor) -> Shard:
        """What this rank holds of `param`."""

    def before_step(self) -> None:
        """Called before gradients are read."""

    def after_step(self) -> None:
        """Called when the values have been updated."""

    def zero_grad(self, set_to_none: bool = True) -> Any:
        """Called when gradients are to be dropped."""


@dataclass
class TensorShard:
    """A plain tensor, the same on every rank, or a DTensor."""

    name: str
    param: torch.Tensor
    layout: Layout
    pinned: bool

    def local(self) -> torch.Tensor:
        """The tensor, or the local part of a DTensor."""
        return local_tensor(self.param)

    def grad(self) -> torch.Tensor | None:
        """The gradient, or its local part. A DTensor's is brought to the placements of its parameter."""
        param, grad = self.param, self.param.grad
        if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
            param.grad = grad = grad.redistribute(placements=param.placements)
        return None if grad is None else local_tensor(grad)

    def state_like(self) -> torch.Tensor:
        """The parameter."""
        return self.param

    def local_state(self, state: torch.Tensor) -> torch.Tensor:
        """The tensor, or the local part of a DTensor."""
        return local_tensor(state)

    def logical(self, state: torch.Tensor) -> Any:
        """The state itself."""
        return state


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The local part of a DTensor; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def tensor_shard(name: str, param: torch.Tensor, *, is_stack: bool) -> TensorShard:
    """The shard of a plain tensor or DTensor; a three-dimensional one is a stack (E, out, in) if `is_stack`.

    Stacks that are sharded on E are pinned: their matrices need not travel. Raises UserError for placements that no
    layout describes.
    """
    stack = stack_shape(param, is_stack=is_stack)
    if not isinstance(param, DTensor):
        return TensorShard(name, param, _replicated(stack, collectives.world_size()), pinned=False)
    mesh = param.device_mesh
    ranks = tuple(mesh.mesh.flatten().tolist())
    axes = tuple(_mesh_shard(name, param, placement, is_stack=is_stack) for placement in param.placements)
    layout = mesh_layout(stack, (tuple(mesh.mesh.shape), ranks), axes)
    held = layout.by_rank.get(collectives.rank(), ())
    numel = sum(holding.box.numel for holding in held)
    if numel != param._local_tensor.numel():
        raise UserError(
            f"{name}: placements {param.placements} over a mesh {tuple(mesh.mesh.shape)} should leave {numel} elements "
            f"on rank {collectives.rank()}, which has {param._local_tensor.numel()}; this way of sharding is not known"
        )
    is_split_by_matrix = stack[0] > 1 and all(axis.dim in (None, 0) for axis in axes)
    return TensorShard(name, param, layout, pinned=is_split_by_matrix)


@lru_cache(maxsize=1024)
def _replicated(stack: Index, num_ranks: int) -> Layout:
    return replicated(stack, range(num_ranks))


def _mesh_shard(name: str, param: DTensor, placement: Placement, *, is_stack: bool) -> MeshShard:
    if isinstance(placement, Replicate):
        return MeshShard(None)
    if not isinstance(placement, (ShardPlacement, _StridedShard)):
        raise UserError(f"{name}: a parameter with placement {placement} cannot be optimized; shard or replicate it")
    if param.ndim == 1:
        return MeshShard(2, strided=isinstance(placement, _StridedShard))
    # The stack's dims are (E, out, in): a weight without E begins at out, and a kernel's dims are folded into in.
    dim = placement.dim % param.ndim + (0 if is_stack else 1)
    if dim > 2:
        raise UserError(f"{name}: {tuple(param.shape)} is sharded on dim {placement.dim}, inside its kernel")
    unit = param.shape[placement.dim + 1 :].numel() if dim == 2 else 1
    return MeshShard(dim, unit, strided=isinstance(placement, _StridedShard))
