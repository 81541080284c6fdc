"""The optimizers that are timed beside each other: ours, others that are installed, and AdamW as the floor.

Nothing of a peer is copied. Each is called as its users call it; where that means iterates in bfloat16 and the device
has no arithmetic for it, it takes part once more with the smallest change that gives it float32 iterates.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from muonlm.bench.placement import Grid
from muonlm.optim.muon import Muon
from muonlm_kernels import newton_schulz

OURS, TORCH, DION, ADAMW = "muonlm Muon", "torch.optim.Muon", "dion Muon", "torch.optim.AdamW, fused"
_LR = 1e-3  # small: the weights stay what they are however many steps are timed


class UnavailableError(Exception):
    """An optimizer cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """An optimizer to time.

    Fields:
        name: as it is printed.
        iterates: dtype of its matrix products; None without any.
        make: from the parameters and how they are placed, to the optimizer. Raises UnavailableError.
        share: of the work of all matrices that one rank does at best.
        around_step: makes a context manager that a step is taken in.
    """

    name: str
    iterates: torch.dtype | None
    make: Callable[[Sequence[nn.Parameter], Grid], torch.optim.Optimizer]
    share: Callable[[Grid], float]
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext


def contenders(dtype: torch.dtype, bucket_bytes: int) -> list[Contender]:
    """All, ours first. `dtype` is that of our iterates."""
    found = [
        Contender(f"{OURS}, {_name(dtype)}", dtype, partial(_ours, dtype=dtype, bucket_bytes=bucket_bytes), _split),
        Contender(f"{TORCH}, as it is", torch.bfloat16, _torch, _split_if_cut),
        Contender(f"{DION}, as it is", torch.bfloat16, _dion, _split_by_cut),
    ]
    if dtype == torch.float32:
        in_float32 = partial(_dion, newton_schulz_func=_newton_schulz_in_float32)
        found += [
            Contender(f"{TORCH}, float32 iterates", dtype, _torch, _split_if_cut, _Bfloat16MeansFloat32),
            Contender(f"{DION}, float32 iterates", dtype, in_float32, _split_by_cut),
        ]
    return [*found, Contender(ADAMW, None, _adamw, lambda grid: 0.0)]


def _ours(params: Sequence[nn.Parameter], grid: Grid, *, dtype: torch.dtype, bucket_bytes: int) -> Muon:
    return Muon(params, lr=_LR, dtype=dtype, bucket_bytes=bucket_bytes)


def _torch(params: Sequence[nn.Parameter], grid: Grid) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise UnavailableError(f"torch {torch.__version__} has none; 2.9 or newer has")
    try:
        return torch.optim.Muon(params, lr=_LR, adjust_lr_fn="match_rms_adamw")
    except ValueError as error:
        raise UnavailableError(str(error)) from error


class _Bfloat16MeansFloat32(TorchFunctionMode):
    """Inside, `tensor.bfloat16()` gives a float32 copy: the one cast that stands before the iteration of a peer."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or copy."""
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def _dion(params: Sequence[nn.Parameter], grid: Grid, **options: Any) -> torch.optim.Optimizer:
    try:
        make = importlib.import_module("dion").Muon
    except ModuleNotFoundError as error:
        raise UnavailableError("not installed (pip install git+https://github.com/microsoft/dion)") from error
    except Exception as error:  # whatever a stranger's module does when it is imported
        raise UnavailableError(f"importing dion failed: {type(error).__name__}: {error}") from error
    if grid.layout == "fsdp-tp":
        raise UnavailableError("does not take parameters that are cut on two axes")
    mesh = grid.cut if grid.mesh is not None else dist.group.WORLD if dist.is_initialized() else None
    # Nesterov as the others have it; it costs an elementwise pass.
    optimizer: torch.optim.Optimizer = make(
        list(params), distributed_mesh=mesh, lr=_LR, nesterov=True, adjust_lr="rms_norm", **options
    )
    return optimizer


def _newton_schulz_in_float32(matrices: torch.Tensor, epsilon: Any = None) -> torch.Tensor:
    """Our own iteration in float32 in the place of a peer's: what is left to compare is how work is distributed."""
    return newton_schulz(matrices, dtype=torch.float32).to(matrices.dtype)


def _adamw(params: Sequence[nn.Parameter], grid: Grid) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=_LR, fused=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _split(grid: Grid) -> float:
    """Spread over all ranks."""
    return 1 / (grid.shards * grid.replicas)


def _split_if_cut(grid: Grid) -> float:
    """Each product is computed by the ranks that hold parts of it, on each replica anew."""
    return 1 / grid.shards


def _split_by_cut(grid: Grid) -> float:
    """Spread over the ranks of a replica, or over all where every rank holds everything."""
    return 1 / grid.shards if grid.shards > 1 else 1 / grid.replicas
