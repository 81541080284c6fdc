"""A job: one run or several, and the machines that are asked for. Checked before anything is submitted.

Imports no torch.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from muonlm.config.errors import UserError
from muonlm.config.load import load_train
from muonlm.config.ranks import micro_batch_size, rank_grid
from muonlm.config.schema import TrainConfig

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
        config_file: the config's file on this machine; None for a config that comes with muonlm.
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
    config_file: Path | None = None

    @property
    def k8s_name(self) -> str:
        """The name as Kubernetes takes it: lower case, and `-` for what a DNS label cannot have."""
        return re.sub(r"[^a-z0-9-]+", "-", self.name.lower()).strip("-")

    @property
    def container_kind(self) -> Literal["apptainer", "pyxis", None]:
        """What starts the container under Slurm: Apptainer for an image file, else the pyxis plugin of srun."""
        if self.container is None:
            return None
        return "apptainer" if self.container.endswith(".sif") else "pyxis"


def load_runs(
    config: str, overrides: Sequence[str], each: Sequence[Sequence[str]], *, in_job: str | None = None
) -> tuple[Run, ...]:
    """The run of a config, or one for each further list of overrides. `in_job` is what the job calls the config.

    Raises UserError for an invalid config, and where two runs would share a directory.
    """
    changes = [[*overrides, *more] for more in each] or [list(overrides)]
    runs = tuple(Run(load_train(config, change), (in_job or config, *change)) for change in changes)
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
    _check_characters(job)
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


def _check_characters(job: Job) -> None:
    """Quotes keep a line break in a shell's word, but not in a `#SBATCH` line, a here-document or YAML."""
    for option, text in _texts(job):
        if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text):
            raise UserError(f"{option} {text!r} has a line break or another character that a script cannot carry")


def _texts(job: Job) -> Iterator[tuple[str, str]]:
    """(what the user calls it, value) of each text that can come into a script."""
    for key in job.__dataclass_fields__:
        value = getattr(job, key)
        if isinstance(value, str):
            yield _flag(key), value
    yield from (("--sbatch", option) for option in job.options)
    yield from (("--env", f"{name}={value}") for name, value in job.env)
    for run in job.runs:
        config, *overrides = run.arguments
        yield "config", config
        yield from (("override", override) for override in overrides)
        yield "run_dir", run.run_dir


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
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}", re.ASCII)
_LONGEST_TIME_S = 2**31 - 1  # Slurm counts the seconds in an int
_LONGEST_LABEL = 63


def _flag(key: str) -> str:
    return _FLAGS.get(key, f"--{key}")


def _check_target(job: Job) -> None:
    for key, targets in _ONLY.items():
        if getattr(job, key) and job.target not in targets:
            hint = "; start it inside the container" if key == "container" else ""
            raise UserError(f"{_flag(key)} is for --to {' and '.join(targets)}, not {job.target}{hint}")
    if len(job.runs) > 1 and job.target != "slurm":
        raise UserError("--each makes an array job, which only --to slurm has; submit the runs one by one")
    if job.min_nodes > job.nodes:
        raise UserError(f"--elastic {job.min_nodes} is more than --nodes {job.nodes}, of which it is the least")
    if job.target == "torchrun" and job.nodes > 1 and not job.head:
        raise UserError("--to torchrun on several nodes needs --head HOST:PORT, an address of the first one")
    if job.head and not re.fullmatch(r"\S+:\d+", job.head):
        raise UserError(f"--head {job.head} is not HOST:PORT, as in 10.0.0.1:29400")
    if job.target == "k8s":
        _check_kubernetes(job)
    if job.time and not _TIME.fullmatch(job.time):
        raise UserError(f"--time {job.time} is no time of Slurm: minutes, H:MM:SS, or D-HH:MM:SS")
    if job.time and _seconds(job.time) <= job.grace_s:
        raise UserError(
            f"--time {job.time} is no longer than the {job.grace_s} s that are kept for saving; raise it, or lower "
            "--grace"
        )
    if job.time and _seconds(job.time) > _LONGEST_TIME_S:
        raise UserError(
            f"--time {job.time} is longer than the 68 years that Slurm can count; a plain number is minutes"
        )
    for option in job.options:
        if not option.startswith("-"):
            raise UserError(f"--sbatch {option!r} is no option of sbatch; write it whole, as in --sbatch=--qos=high")
    if "/" not in job.python and len(job.python.split()) != 1:
        raise UserError(f"--python {job.python!r} is no interpreter: give one path or one name, without arguments")


def _check_kubernetes(job: Job) -> None:
    if not job.container:
        raise UserError("--to k8s needs --container IMAGE, one that has muonlm")
    if not job.volume:
        raise UserError("--to k8s needs --volume CLAIM: without one, the run directory ends with its pod")
    if not job.workdir.startswith("/"):
        raise UserError(f"--workdir {job.workdir}: in a pod it begins with /, as /workspace does")
    if not re.match("[a-z]", job.k8s_name):
        raise UserError(
            f"name = {job.name} would be {job.k8s_name!r} in Kubernetes, where a name begins with a letter; give "
            "another, as in name=run-1"
        )
    longest = _LONGEST_LABEL - len(f"-{job.nodes - 1}")  # a pod's host name ends with its number
    if len(job.k8s_name) > longest:
        raise UserError(
            f"name = {job.name} has {len(job.k8s_name)} characters in Kubernetes, which beside the number of a pod has "
            f"room for {longest}; give a shorter one, as in name=run-1"
        )


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
