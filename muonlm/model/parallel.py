"""The projections of a model cut over ranks that share a layer, and its experts dealt out.

Tensor parallelism (Megatron-LM, arXiv:1909.08053) gives each rank whole heads, or whole columns of a feed-forward
layer: rows of what reads the residual stream, columns of what writes to it. Expert parallelism (GShard,
arXiv:2006.16668) gives each rank whole experts.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from muonlm.model.gpt import GPT, Attention
from muonlm.model.mlp import MLP
from muonlm.model.moe import MoE, RoutedExperts

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")
_EXPERT_DIMS = {"gate_proj": 1, "up_proj": 1, "down_proj": 2}  # of a stack (E, out, in), cut as their dense twins


def shard_layers(
    model: GPT, *, tensor: DeviceMesh | None, expert: DeviceMesh | None, both: DeviceMesh | None = None
) -> None:
    """Cut the matrices of the blocks over the ranks of `tensor` and the experts over those of `expert`, in place.

    `both` is the mesh of the two axes, expert and tensor, where there are both. What is cut becomes DTensors on the
    mesh's device; with `tensor` all parameters do, the others replicated. Communicates nothing; all ranks must hold the
    same values before, or none yet (meta). The sizes must divide what they cut: `GPTConfig.undivided_by`.
    """
    placements: dict[nn.Module, Placement] = {}
    for module in model.modules():
        if tensor is not None:
            placements |= _share(module, tensor)
    for module in model.modules():
        is_stack = isinstance(module, RoutedExperts)
        if isinstance(module, RoutedExperts) and expert is not None:
            module.group = expert.get_group()
        for name, param in list(module.named_parameters(recurse=False)):
            mesh, cuts = tensor, [Shard(_EXPERT_DIMS[name]) if is_stack else placements.get(module, Replicate())]
            if is_stack and expert is not None:
                mesh, cuts = both or expert, [Shard(0), *(cuts if both is not None else [])]
            if mesh is not None:
                # Without a source rank, each takes its part of its own copy.
                part = distribute_tensor(param.detach(), mesh, cuts, src_data_rank=None)
                module.register_parameter(name, nn.Parameter(part))
    model.tie_weights()


def expert_modules(model: GPT) -> list[nn.Module]:
    """The modules that hold expert stacks."""
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def _share(module: nn.Module, tensor: DeviceMesh) -> dict[nn.Module, Placement]:
    """Tell a layer with whom it shares its columns; how the weights of the modules below are cut."""
    if not isinstance(module, Attention | MLP | MoE):
        return {}
    module.group = tensor.get_group()
    if isinstance(module, Attention):
        heads, size = module.heads, tensor.size()
        module.heads = heads._replace(num_heads=heads.num_heads // size, num_kv_heads=heads.num_kv_heads // size)
    dims = dict.fromkeys(_BY_ROWS, 0) | dict.fromkeys(_BY_COLUMNS, 1)
    return {child: Shard(dims[name]) for name, child in module.named_children() if name in dims}
