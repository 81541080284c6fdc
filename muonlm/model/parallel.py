"""Tensor parallelism: the projections of a model cut over a group of ranks (Megatron-LM, arXiv:1909.08053)."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from muonlm.model.gpt import GPT, MLP, Attention

# Each rank has whole heads, or whole columns of the SwiGLU layer: rows of what reads the residual stream, columns of
# what writes to it.
_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")


def shard_tensors(model: GPT, mesh: DeviceMesh) -> None:
    """Cut the matrices of the blocks over the ranks of a one-dimensional mesh, in place; communicates nothing.

    All parameters become DTensors on the mesh's device: the projections cut, the others replicated. All ranks must hold
    the same values before. The mesh's size must divide the numbers of heads and the intermediate size.
    """
    placements: dict[nn.Module, Placement] = {}
    for module in model.modules():
        if isinstance(module, Attention | MLP):
            module.group = mesh.get_group()
            placements |= {getattr(module, name): Shard(0) for name in _BY_ROWS if hasattr(module, name)}
            placements |= {getattr(module, name): Shard(1) for name in _BY_COLUMNS if hasattr(module, name)}
        if isinstance(module, Attention):
            heads = module.heads
            module.heads = heads._replace(
                num_heads=heads.num_heads // mesh.size(), num_kv_heads=heads.num_kv_heads // mesh.size()
            )
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            placement = placements.get(module, Replicate())
            # Without a source rank, each takes its part of its own copy.
            part = distribute_tensor(param.detach(), mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part))
    model.tie_weights()
