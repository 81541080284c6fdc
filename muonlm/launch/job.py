"""A job: one run or several, and the machines that are asked for. Checked before anything is submitted.

Imports no torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from muonlm.config.errors import UserError
from muonlm.config.load import load_train
from muonlm.config.ranks import micro_batch_size, rank_grid
from muonlm.config.schema import TrainConfig
from muonlm.data.manifest import MANIFEST_NAME

Target = Literal["torchrun", "slurm", "k8s"]


@dataclass(frozen=True)
class Run:
    """A run of a job: its config, and the arguments of `muonlm train` that stand for it."""

    config: TrainConfig
    arguments: tuple[str, ...]

    @property
    def run_dir(self) -> str:
        """The run directory, relative to the job's directory unless it is absolute."""
        return self.config.resolved_run_dir


@dataclass(frozen=True)
class Job:
    """What is to run where.

    Fields:
        target: who starts it. name: that of its run, or of the config before an array's changes.
        runs: the tasks of an array, or one.
        nodes: number of nodes; min_nodes: how few of them it goes on with (elastic), 0: with no fewer.
        ranks_per_node: processes; gpus_per_node: GPUs, 0 where the ranks compute on CPUs.
        cpus_per_node: cores; None asks for whole nodes.
        head: HOST:PORT where the nodes meet (torchrun on several nodes).
        time, partition, options: for Slurm, the last as further `#SBATCH` lines.
        container: image; volume: claim of a volume for the job's directory (Kubernetes).
        interface: network interface of socket traffic. env: further variables of the ranks.
        grace_s: seconds that the ranks have between a stop signal and the end.
        max_restarts: how often torchrun starts the ranks again after one failed.
        python: the interpreter that has muonlm. workdir: where the job runs, and relative paths begin.
        templates: a folder whose files win over the shipped ones.
    """

    target: Target
    name: str
    runs: tuple[Run, ...]
    nodes: int
    ranks_per_node: int
    gpus_per_node: int = 0
    min_nodes: int = 0
    cpus_per_node: int | None = None
    head: str | None = None
    time: str | None = None
    partition: str | None = None
    options: tuple[str, ...] = ()
    container: str | None = None
    volume: str | None = None
    interface: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    grace_s: int = 120
    max_restarts: int = 3
    python: str = sys.executable
    workdir: str = field(default_factory=os.getcwd)
    templates: Path | None = None

    @property
    def container_kind(self) -> Literal["apptainer", "pyxis", None]:
        """What starts the container under Slurm: Apptainer for an image file, else the pyxis plugin of srun."""
        if self.container is None:
            return None
        return "apptainer" if self.container.endswith(".sif") else "pyxis"


def load_runs(config: str, overrides: Sequence[str], each: Sequence[Sequence[str]]) -> tuple[Run, ...]:
    """The run of a config, or one for each further list of overrides.

    Raises UserError for an invalid config, and where two runs would share a directory.
    """
    changes = [[*overrides, *more] for more in each] or [list(overrides)]
    runs = tuple(Run(load_train(config, change), (config, *change)) for change in changes)
    seen: dict[Path, int] = {}
    for index, run in enumerate(runs):
        other = seen.setdefault(Path(run.run_dir).absolute(), index)
        if other != index:
            raise UserError(
                f"--each: runs {other} and {index} would both train in {run.run_dir}; give each a name: "
                f"--each 'name={run.config.name}-{index} ...'"
            )
    return runs


def check(job: Job) -> None:
    """Refuse what could not run as asked, before it waits in a queue. Raises UserError with what to change."""
    _check_target(job)
    for run in job.runs:
        for nodes in range(job.min_nodes or job.nodes, job.nodes + 1):
            _check_ranks(run.config, nodes * job.ranks_per_node)
        device = run.config.loop.device
        if device == "cuda" and not job.gpus_per_node:
            raise UserError(f'loop.device = "cuda" of {run.config.name} needs --gpus-per-node')
        if device == "cpu" and job.gpus_per_node:
            raise UserError(
                f'loop.device = "cpu" of {run.config.name} leaves --gpus-per-node {job.gpus_per_node} idle; give '
                "--ranks-per-node in its place, or take another device"
            )


def _check_ranks(config: TrainConfig, world_size: int) -> None:
    try:
        micro_batch_size(config, rank_grid(config, world_size).data)
    except UserError as error:
        raise UserError(f"{config.name} on {world_size} ranks: {error}") from None


def unprepared_data(job: Job) -> list[tuple[Path, str | None]]:
    """Directories without prepared data, each with the data config by which the job prepares them; None without one.

    Empty for a job in a container, whose files this machine may not see.
    """
    if job.container is not None:
        return []
    used = dict.fromkeys((Path(job.workdir, run.config.data.path), run.config.data.prepare) for run in job.runs)
    return [(path, config) for path, config in used if not (path / MANIFEST_NAME).is_file()]


# Option -> the targets that know it.
_ONLY: dict[str, tuple[Target, ...]] = {
    "time": ("slurm",),
    "partition": ("slurm",),
    "options": ("slurm",),
    "cpus_per_node": ("slurm",),
    "head": ("torchrun",),
    "min_nodes": ("torchrun",),
    "volume": ("k8s",),
    "container": ("slurm", "k8s"),
}
_FLAGS = {"options": "--sbatch", "min_nodes": "--elastic", "cpus_per_node": "--cpus-per-node"}
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}")


def _check_target(job: Job) -> None:
    for key, targets in _ONLY.items():
        if getattr(job, key) and job.target not in targets:
            hint = "; start it inside the container" if key == "container" else ""
            raise UserError(
                f"{_FLAGS.get(key, f'--{key}')} is for --to {' and '.join(targets)}, not {job.target}{hint}"
            )
    if len(job.runs) > 1 and job.target != "slurm":
        raise UserError("--each makes an array job, which only --to slurm has; submit the runs one by one")
    if job.min_nodes > job.nodes:
        raise UserError(f"--elastic {job.min_nodes} is more than --nodes {job.nodes}, of which it is the least")
    if job.target == "torchrun" and job.nodes > 1 and not job.head:
        raise UserError("--to torchrun on several nodes needs --head HOST:PORT, an address of the first one")
    if job.head and not re.fullmatch(r"\S+:\d+", job.head):
        raise UserError(f"--head {job.head} is not HOST:PORT, as in 10.0.0.1:29400")
    if job.target == "k8s" and not job.container:
        raise UserError("--to k8s needs --container IMAGE, one that has muonlm")
    if job.target == "k8s" and not job.volume:
        raise UserError("--to k8s needs --volume CLAIM: without one, the run directory ends with its pod")
    if job.time and not _TIME.fullmatch(job.time):
        raise UserError(f"--time {job.time} is no time of Slurm: minutes, H:MM:SS, or D-HH:MM:SS")
    if job.time and _seconds(job.time) <= job.grace_s:
        raise UserError(
            f"--time {job.time} is no longer than the {job.grace_s} s that are kept for saving; raise it, or lower "
            "--grace"
        )
    for option in job.options:
        if not option.startswith("-") or "\n" in option:
            raise UserError(f"--sbatch {option!r} is no option of sbatch; write it whole, as in --sbatch=--qos=high")


def _seconds(time: str) -> int:
    """Seconds of a time as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
