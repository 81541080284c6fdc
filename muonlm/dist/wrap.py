"""Data parallelism around a module: gradients averaged by DistributedDataParallel, or parameters cut by FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from muonlm.dist.mesh import Mesh


def wrap(
    module: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, *, reshard_after_forward: bool = True
) -> nn.Module:
    """What is to be called in place of `module` so that its gradients come out averaged over data-parallel ranks.

    Where the mesh cuts parameters, FSDP2 takes each of `blocks` as a unit, gathered and freed as a whole, and the rest
    as another; `module` then keeps its name and class, its parameters become DTensors on the mesh's device, and the
    result is `module` itself. Otherwise the module must be on that device already and is wrapped in
    DistributedDataParallel; one data-parallel rank needs no wrapping.

    Collectives: those of DistributedDataParallel's construction; none with FSDP2, for which all ranks must hold the
    same values, or the parts of them that tensor parallelism leaves them.
    """
    if (axes := mesh.sharded) is not None:
        for block in blocks:
            fully_shard(block, mesh=axes, reshard_after_forward=reshard_after_forward)
        fully_shard(module, mesh=axes)
        return module
    if mesh.data_size == 1:
        return module
    devices = [mesh.device.index] if mesh.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def without_gradient_sync(module: nn.Module) -> Iterator[None]:
    """Backward passes inside add up gradients on this rank, for one outside that averages the sum.

    `module` is what `wrap` returned, or an engine with a `no_sync` of its own.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    elif callable(no_sync := getattr(module, "no_sync", None)):
        with no_sync():
            yield
    else:
        yield


def free_gathered(module: nn.Module) -> None:
    """Free parameters that FSDP2 has gathered for a forward pass that no backward pass follows.

    It keeps those of the outermost module, and would use them again after an update.
    """
    if isinstance(module, FSDPModule):
        module.reshard()
