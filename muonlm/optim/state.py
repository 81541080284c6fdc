"""Optimizer state under parameter names, as logical tensors: what a checkpoint holds, on any number of ranks."""

from __future__ import annotations

from typing import Any

from muonlm.config.errors import UserError
from muonlm.optim.muon import Muon


def named_state(optimizer: Muon) -> dict[str, dict[str, Any]]:
    """Parameter name -> key -> state tensor: the tensors of the optimizer themselves, to be read or overwritten.

    Plain tensors, DTensors, or, from an engine that shards in its own way, what `Shard.logical` makes of them:
    torch.distributed.checkpoint takes them all. The names and keys are the same on every rank, also on those that hold
    nothing of a parameter. Communicates nothing. Raises UserError where two parameters have one name.
    """
    named: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for param, shard in zip(group["params"], optimizer.shards(group), strict=True):
            if shard.name in named:
                raise UserError(
                    f"two parameters of the optimizer are named {shard.name}; a checkpoint needs one name each"
                )
            state = optimizer.state[param]
            # A count of steps is the same on all ranks, however the parameter is sharded.
            named[shard.name] = {key: shard.logical(t) if t.ndim else t for key, t in state.items()}
    return named
