"""Checkpoints of what is trained under DeepSpeed, under parameter names: restored at another stage, on other ranks.

DeepSpeed's own checkpoints hold flat partitions and load where stage and number of ranks are the same. These hold
logical tensors, under the names of muonlm's own checkpoints: `model.<parameter>` (in the precision that is trained in),
`model.<buffer>` and `optimizer.<parameter>.<key>`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from muonlm.bridge.deepspeed.optimizer import DeepSpeedMuon
from muonlm.bridge.deepspeed.partitions import refresh
from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.dist.dcp import UNREADABLE, quiet_checkpoints


def save_checkpoint(engine: Any, path: str | Path) -> None:
    """Write parameters, buffers and optimizer state to the directory `path`, each rank its part. Called by all ranks.

    Learning-rate schedules, loss scales and counters are not in it: DeepSpeed's `engine.save_checkpoint` has them.
    Collectives: those of dcp.save. Raises UserError for frozen parameters in stage 3, where `bind` was not called, and
    where it cannot be written; `path` is then not to be used.
    """
    tensors = EngineTensors(engine).named()
    try:
        with quiet_checkpoints():
            dcp.save(tensors, checkpoint_id=Path(path), no_dist=not collectives.is_active())
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
        raise UserError(f"the checkpoint could not be written to {path}: {_reason(error)}") from error


def load_checkpoint(engine: Any, path: str | Path) -> None:
    """Restore what `save_checkpoint` wrote, bit for bit, at any stage and on any number of ranks. Called by all ranks.

    It may hold other things too, as muonlm's own checkpoints do. Collectives: those of dcp.load; one all_gather of the
    parameters in stages 1 and 2. Raises UserError where it does not fit the model, as well as what `save_checkpoint`
    raises.
    """
    contents = EngineTensors(engine)
    tensors = contents.named()
    try:
        with quiet_checkpoints():
            stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            names = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
            if different := names ^ set(tensors["model"]):
                raise ValueError(f"only one of the two has {min(different)}")
            dcp.load(tensors, checkpoint_id=Path(path), no_dist=not collectives.is_active())
    except (*UNREADABLE, RuntimeError) as error:
        raise UserError(
            f"checkpoint {path} cannot be loaded: {_reason(error)}; it must be of the same model"
        ) from error
    contents.loaded(tensors)


def _reason(error: BaseException) -> Any:
    failures = getattr(error, "failures", None)  # by rank
    return next(iter(failures.values()))[0] if failures else error


class EngineTensors:
    """What a checkpoint of an engine holds: `muonlm.checkpoint.store.Contents`.

    Raises UserError where the engine was not made with `muon_for_deepspeed`.
    """

    def __init__(self, engine: Any) -> None:
        optimizer = getattr(engine.optimizer, "optimizer", None)
        if not isinstance(optimizer, DeepSpeedMuon):
            raise UserError("the engine was not made with muon_for_deepspeed: use engine.save_checkpoint")
        self._module, self._optimizer = engine.module, optimizer

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._optimizer.device

    def named(self) -> dict[str, Any]:
        """What is saved, also the template that is loaded into: most of it is memory of DeepSpeed's.

        Raises UserError for frozen parameters in stage 3, and where `bind` was not called.
        """
        model: dict[str, Any] = {}
        state: dict[str, dict[str, Any]] = {}
        for bound in self._optimizer.partitions:
            for shard in bound.shards:
                model[shard.name] = shard.logical(bound.flat)
                state[shard.name] = {key: shard.logical(bound.state[key]) for key in bound.state_keys}
                if bound.muon is None:
                    state[shard.name]["step"] = bound.state["step"].clone()
        names = {param: name for name, param in self._module.named_parameters()}
        params = dict(self._module.named_parameters(remove_duplicate=False))
        whole = set(self._module.state_dict()) - params.keys()  # buffers that are meant to be saved
        model |= {name: buffer for name, buffer in self._module.named_buffers() if name in whole}
        frozen = {name: param for name, param in params.items() if not param.requires_grad}
        if cut := [name for name, param in frozen.items() if hasattr(param, "ds_tensor")]:
            raise UserError(
                f"{cut[0]} is frozen, and stage 3 keeps it in parts that are not saved here: use "
                "engine.save_checkpoint, or stage 1 or 2"
            )
        model |= {name: param.data for name, param in frozen.items()}
        tied = {name: model[names[param]] for name, param in params.items() if name not in model}
        return {"model": model | tied, "optimizer": state}

    def loaded(self, tensors: dict[str, Any]) -> None:
        """Take over what was loaded into `tensors`, those of `named`. One all_gather in stages 1 and 2."""
        for bound in self._optimizer.partitions:
            if bound.muon is None:
                bound.state["step"].copy_(tensors["optimizer"][bound.shards[0].name]["step"])
        refresh(self._optimizer.zero)
