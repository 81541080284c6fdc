"""DeepSpeed as the engine of `muonlm train`: what the loop calls for its loss, and what it has for an optimizer.

DeepSpeed averages gradients and keeps the partitions; learning rates, clipping, checks and checkpoints are those of the
other engines, so that a run computes the same and may go on under another one.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from muonlm.bridge.deepspeed.bound import PartitionShard
from muonlm.bridge.deepspeed.guards import check_config, check_version
from muonlm.bridge.deepspeed.optimizer import DeepSpeedMuon, bind, muon_for_deepspeed
from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.dist.agree import on_main, raised_on_all_ranks
from muonlm.optim.gradients import GradNorms, GroupShards, agree_and_clip, describe
from muonlm.optim.plan import Plan

# Keys of DeepSpeed's that the configuration of a run decides, and what does.
_DECIDED = {
    "train_batch_size": "loop.batch_size",
    "train_micro_batch_size_per_gpu": "loop.micro_batch_size",
    "gradient_accumulation_steps": "loop.batch_size and loop.micro_batch_size",
    "gradient_clipping": "loop.grad_clip",
    "optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "loop.precision",
    "bf16": "loop.precision",
    "amp": "loop.precision",
    "torch_autocast": "loop.precision",
    "data_types": "loop.precision",
    "zero_allow_untested_optimizer": "this engine",
    "zero_force_ds_cpu_optimizer": "this engine",
}


def import_deepspeed(device: torch.device) -> Any:
    """The package, for `device`, and quiet. Raises UserError where it is missing, or of a version that was not tested.

    On CPUs without the collectives for shared memory, which would be compiled first, for half a minute, and only serve
    inference.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        deepspeed = importlib.import_module("deepspeed")
        ops = importlib.import_module("deepspeed.ops").__compatible_ops__
    except Exception as error:  # a broken installation raises anything
        raise UserError(
            f"DeepSpeed cannot be imported ({type(error).__name__}: {error}): pip install 'muonlm[deepspeed]'"
        ) from error
    if device.type == "cpu":
        ops["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing it has set another
    check_version()
    return deepspeed


def engine_config(config: TrainConfig, num_ranks: int, micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run: what `config` says, and `zero_optimization` of `dist.deepspeed_config`.

    Raises UserError for a file that is no JSON object, for keys that the run's configuration decides, that DeepSpeed
    does not know, or that `check_config` refuses.
    """
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.loop.batch_size // num_ranks // micro_batch,
        "gradient_clipping": 0.0,  # the optimizer clips what AdamW updates, as under the other engines
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    path = config.dist.deepspeed_config
    zero = {} if path is None else _read(path)
    merged = {**own, "zero_optimization": {**zero, "stage": config.dist.zero}}
    check_config(merged)
    try:
        importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig(**merged["zero_optimization"])
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"dist.deepspeed_config {path}, zero_optimization: {problems}") from error
    return merged


def start(
    model: nn.Module,
    config: TrainConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    iterate_dtype: torch.dtype,
    **batch: int,
) -> tuple[LossEngine, EngineOptimizer]:
    """Hand an initialised model, the same on all ranks, to DeepSpeed, which brings it to `device`. Called by all ranks.

    In stage 3 that happens parameter by parameter, so that a model on the CPU is never whole on the device. `dtype` is
    that of the forward pass, and `batch` what `engine_config` takes. Raises UserError for what that and `bind` refuse,
    and for a DeepSpeed that is missing or not tested.
    """
    with raised_on_all_ranks():
        deepspeed = import_deepspeed(device)
    settings = on_main(lambda: engine_config(config, **batch))
    if config.dist.zero == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        for module in model.modules():
            module._buffers = {
                name: None if buffer is None else buffer.to(device) for name, buffer in module._buffers.items()
            }
    with raised_on_all_ranks():
        optimizer = muon_for_deepspeed(
            model, config.optim, iterate_dtype=iterate_dtype, width_ratio=config.model.width_ratio
        )
    _autocast_inside(model, device, dtype)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it, and without torchrun there is none
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return LossEngine(engine), EngineOptimizer(engine, bind(engine))


class LossEngine(nn.Module):
    """An engine of DeepSpeed's as the training loop calls it: for the loss, and for the backward pass from it."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine
        engine.set_gradient_accumulation_boundary(True)

    def forward(self, *args: Any) -> Any:
        """The engine's forward pass."""
        return self.engine(*args)

    def about(self) -> dict[str, Any]:
        """Version and configuration, as JSON."""
        version = importlib.import_module("deepspeed").__version__
        return {"deepspeed": version, "deepspeed_config": self.engine._config._param_dict}

    def backward(self, loss: Tensor) -> None:
        """Add up the gradients of `loss`. Collectives: DeepSpeed's."""
        self.engine.backward(loss, scale_wrt_gas=False)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Passes inside are not the last of a step."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)


class EngineOptimizer:
    """An engine of DeepSpeed's with our optimizer in it, as the training loop uses `muonlm.optim.muon.Muon`."""

    def __init__(self, engine: Any, muon: DeepSpeedMuon) -> None:
        self._engine, self._muon = engine, muon
        self._is_pending = self._is_skipped = False
        names = [shard.name for bound in muon.partitions for shard in bound.shards]
        self._description = describe(names, [str(muon.config)])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups by role with their settings; DeepSpeed keeps its partitions in them."""
        return self._muon.param_groups

    def shards(self, group: Mapping[str, Any]) -> list[PartitionShard]:
        """What this process holds of each parameter of a group."""
        number = next(number for number, other in enumerate(self.param_groups) if other is group)
        return [shard for bound in self._muon.partitions if bound.group == number for shard in bound.shards]

    def plans(self) -> Sequence[Plan]:
        """Who orthogonalizes what, in each partition under Muon."""
        return self._muon.plans()

    @torch.no_grad()
    def clip_gradients(self, max_norm: float = 0.0) -> GradNorms:
        """As `Muon.clip_gradients`, between the last backward pass and the step."""
        groups = [
            GroupShards(group["name"], group["rule"] == "adamw", self.shards(group)) for group in self.param_groups
        ]
        norms = agree_and_clip(
            groups,
            self._description,
            max_norm=max_norm,
            device=self._muon.device,
            skip_non_finite=self._muon.config.non_finite == "skip",
        )
        self._is_pending, self._is_skipped = True, norms.is_skipped
        return norms

    def step(self) -> None:
        """Update everything, unless `clip_gradients` has found gradients that are not finite and are to be skipped."""
        if not self._is_skipped:
            self._engine.step()
            self._is_pending = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that no step has used. DeepSpeed does it in its step, which then changes nothing."""
        if self._is_pending:
            self._muon.is_withheld = True
            self._engine.step()
            self._muon.is_withheld = self._is_pending = self._is_skipped = False


def _autocast_inside(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Autocast within the forward pass: DeepSpeed switches off what is on around it.

    DeepSpeed's own, `torch_autocast`, also averages gradients in 16 bits.
    """
    forward = model.forward

    def run(*args: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return forward(*args)

    model.forward = run


def _read(path: str) -> dict[str, Any]:
    """Its `zero_optimization`. Raises UserError for any other key, with what decides that."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"dist.deepspeed_config {path} cannot be read: {error}") from error
    zero = given.get("zero_optimization", {}) if isinstance(given, dict) else None
    if not isinstance(zero, dict):
        raise UserError(f"dist.deepspeed_config {path} must be a JSON object, and zero_optimization in it, too")
    problems = [
        f"  {key}: " + (f"{_DECIDED[key]} decides that" if key in _DECIDED else "not taken here")
        for key in given
        if key != "zero_optimization"
    ]
    problems += ["  zero_optimization.stage: dist.zero decides that"] if "stage" in zero else []
    if problems:
        raise UserError(f"dist.deepspeed_config {path}: remove\n" + "\n".join(problems))
    return zero
