"""Start and stop the process group from torchrun's environment."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from muonlm.config.errors import UserError
from muonlm.config.schema import DistConfig
from muonlm.dist import collectives, selftest


@dataclass(frozen=True)
class World:
    """This process among all processes of the run. `backend` is None when there is only one process."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str | None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0


def start(config: DistConfig, device: str = "auto") -> World:
    """Join the process group that torchrun's environment describes; without torchrun, run alone.

    `device` is "auto", "cpu" or "cuda". With several ranks a self-test of 4 MiB runs, and rank 0 prints who is there on
    stderr. Raises UserError for an impossible device or backend, and when the other ranks cannot be reached within
    `config.timeout_s`.
    """
    rank, size, local_rank = (_env_int(name, default) for name, default in _TORCHRUN)
    torch_device = _pick_device(device, local_rank)
    _refuse_silent_copies(size)
    if torch_device.type == "cpu":
        _keep_freed_memory()
    if size == 1 and config.engine == "torch":
        return World(0, 1, local_rank, torch_device, None)
    backend = config.backend if config.backend != "auto" else ("nccl" if torch_device.type == "cuda" else "gloo")
    if backend == "nccl" and torch_device.type != "cuda":
        raise UserError("dist.backend: 'nccl' needs CUDA devices; use 'gloo' or 'auto' on CPU")
    if size == 1:  # DeepSpeed needs a process group even so
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return World(0, 1, local_rank, torch_device, None)
    _join(rank, size, torch_device, backend, config.timeout_s)
    collectives.set_timeout(timedelta(seconds=config.timeout_s))
    return World(rank, size, local_rank, torch_device, backend)


def _join(rank: int, size: int, device: torch.device, backend: str, timeout_s: float) -> None:
    """Meet the other ranks, form the process group, and see that a sum comes out right."""
    places: list[selftest.Place] = []
    try:
        store = selftest.connect(rank, size, timeout_s)
        places = selftest.check_in(store, rank, size, selftest.find_place(device, backend), timeout_s)
        if rank == 0:
            selftest.check_routes(places, backend)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {size} could not join the process group ({backend}, "
            f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}): {error}"
        ) from error
    seconds = selftest.first_sum(store, rank, size, device, timeout_s)
    if rank == 0:
        print(selftest.summary(places, backend, seconds), file=sys.stderr, flush=True)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        collectives.forget_teams()


_TORCHRUN = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def _env_int(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    try:
        return int(value)
    except ValueError:
        raise UserError(f"environment variable {name}={value!r} is no integer; start ranks with torchrun") from None


def _pick_device(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"loop.device: rank with LOCAL_RANK={local_rank} needs {local_rank + 1} CUDA devices, found {count}; "
            "lower --nproc-per-node or set loop.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step, where it would give large blocks back to the kernel.

    Activations are freed and allocated again in every step; without this, mapping their pages anew costs a tenth of
    it. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _KEEP_MEMORY.items():
            mallopt(option, value)


# Options of mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, in bytes.
_KEEP_MEMORY = {-3: 1 << 30, -1: 2**31 - 1, -2: 1 << 28}


def _refuse_silent_copies(size: int) -> None:
    """`srun -n 8 muonlm train` without torchrun would run eight identical copies on one directory.

    In a batch script there is no step yet, and one process would use one of the tasks that were asked for.
    """
    if size > 1:
        return
    for name, launcher in _TASK_COUNTS.items():
        tasks = os.environ.get(name, "")
        if tasks.isdigit() and int(tasks) > 1:
            raise UserError(
                f"{launcher} has {tasks} tasks here ({name}), but WORLD_SIZE is not set: each would be a separate run "
                "in one directory, or one of them would do all the work. Start one task per node and let torchrun "
                f"start the ranks, as `muonlm submit --to slurm` does; for one process on purpose: env -u {name}"
            )
        if tasks.isdigit() and name == "SLURM_STEP_NUM_TASKS":
            return  # a step of one task, in a job of any number of them


# What says how many tasks a launcher has started, or would: the step before the job that it is part of.
_TASK_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "Slurm",
    "SLURM_NTASKS": "Slurm",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
