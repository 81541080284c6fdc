"""Data parallelism around a module: gradients averaged by DistributedDataParallel, or parameters cut by FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from muonlm.dist.mesh import Mesh


def wrap(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    *,
    experts: Iterable[nn.Module] = (),
    reshard_after_forward: bool = True,
    gather_dtype: torch.dtype | None = None,
) -> nn.Module:
    """What is to be called in place of `module` so that its gradients come out averaged over data-parallel ranks.

    Where the mesh cuts parameters, FSDP2 takes each of `blocks` as a unit, gathered and freed as a whole, and the rest
    as another; `module` then keeps its name and class, its parameters become DTensors on the mesh's device, and the
    result is `module` itself. `experts` are modules below the blocks whose parameters expert parallelism has cut: units
    of their own, over the ranks that hold the same. Parameters are gathered in `gather_dtype`, their own when None, and
    gradients averaged in fp32. Otherwise the module must be on that device already and is wrapped in
    DistributedDataParallel; one data-parallel rank needs no wrapping.

    Collectives: those of DistributedDataParallel's construction; none with FSDP2, for which all ranks must hold the
    same values, or the parts of them that tensor parallelism leaves them.
    """
    if (axes := mesh.sharded) is not None:
        policy = MixedPrecisionPolicy(
            param_dtype=gather_dtype, reduce_dtype=torch.float32 if gather_dtype else None, cast_forward_inputs=False
        )
        options: dict[str, Any] = {"mp_policy": policy}
        if (expert_axes := mesh.expert_sharded) is not None:
            _shard_experts(experts, expert_axes, mesh, reshard_after_forward=reshard_after_forward, **options)
        for block in blocks:
            fully_shard(block, mesh=axes, reshard_after_forward=reshard_after_forward, **options)
        fully_shard(module, mesh=axes, **options)
        return module
    if mesh.data_size == 1:
        return module
    devices = [mesh.device.index] if mesh.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


def _shard_experts(experts: Iterable[nn.Module], axes: DeviceMesh, mesh: Mesh, **options: Any) -> None:
    """Cut stacks between experts where each rank gets whole ones, so that Muon need not gather them; else within.

    FSDP2 cuts no dim but the first unevenly, which then remains.
    """
    num_ranks = mesh.grid.shard // mesh.grid.expert

    def placement(param: nn.Parameter) -> Shard:
        shape = param.to_local().shape if isinstance(param, DTensor) else param.shape
        return Shard(next((dim for dim, size in enumerate(shape) if size % num_ranks == 0), 0))

    for module in experts:
        fully_shard(module, mesh=axes, shard_placement_fn=placement, **options)


@contextmanager
def without_gradient_sync(module: nn.Module) -> Iterator[None]:
    """Backward passes inside add up gradients, for one outside that completes their average.

    `module` is what `wrap` returned, or an engine with a `no_sync` of its own. FSDP2 averages over the ranks that it
    cuts a model over in every pass, so that no rank keeps whole gradients; only copies of the model wait for the last.

    Collectives: of a pass inside, with FSDP2 one reduce_scatter of each of its units, and no all_reduce.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(False)
        try:
            yield
        finally:
            module.set_requires_all_reduce(True)
    elif callable(no_sync := getattr(module, "no_sync", None)):
        with no_sync():
            yield
    else:
        yield


def backward(module: nn.Module, loss: Tensor) -> None:
    """The backward pass from a loss that `module` gave; an engine with a `backward` of its own makes it."""
    own = getattr(module, "backward", None)
    if own is None:
        loss.backward()
    else:
        own(loss)


def free_gathered(module: nn.Module) -> None:
    """Free parameters that FSDP2 has gathered for a forward pass that no backward pass follows.

    It keeps those of the outermost module, and would use them again after an update.
    """
    if isinstance(module, FSDPModule):
        module.reshard()
