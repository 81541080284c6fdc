"""What a job takes from the machine that submits it: the config's file, its directory, its interpreter, its data.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from muonlm.config.errors import ConfigError
from muonlm.config.load import available, find
from muonlm.data.manifest import MANIFEST_NAME
from muonlm.launch.job import Job, Target


def find_own(config: str) -> Path | None:
    """The file of a config; None for one that comes with muonlm. Raises ConfigError where there is none."""
    path = find("train", config)
    return None if path == available("train").get(config) else path


def name_in_job(config: str, file: Path | None, *, target: Target, container: str | None, workdir: str) -> str:
    """What `muonlm train` has to be given in the job's directory, so that it reads the file that was checked here.

    A job in another directory gets an absolute path. One in a container sees this machine's files below `workdir`, and
    gets a path relative to it for those. A pod sees none, and gets what was given.
    """
    if file is None or target == "k8s":
        return config
    if container is not None and _is_below(file, workdir):
        return os.path.relpath(os.path.realpath(file), os.path.realpath(workdir))
    return config if os.path.realpath(workdir) == os.path.realpath(".") else os.path.abspath(file)


def missing(job: Job) -> list[str]:
    """What the job needs and this machine does not have, a message each. Empty for a pod, which sees none of it."""
    if job.target == "k8s":
        return []
    found = []
    if not Path(job.workdir).is_dir():
        found.append(f"--workdir {job.workdir}: no such folder here")
    if job.container is None and shutil.which(job.python) is None:
        found.append(f"--python {job.python}: no such program here; it is one path or name, without arguments")
    for path, config in unprepared_data(job):
        try:
            if config is not None:
                find("data", config, Path(job.workdir))
        except ConfigError as error:
            found.append(
                f"no prepared data in {path}, nor the config that would write them: data.prepare={config}\n{error}"
            )
    return found


def assumed(job: Job) -> list[str]:
    """What cannot be looked up here about the files in a container, a message each."""
    if job.config_file is None or job.container is None:
        return []
    if job.target == "slurm" and _is_below(job.config_file, job.workdir):
        return []
    path = os.path.join(job.workdir, job.runs[0].arguments[0])
    where = "the image or the volume" if job.target == "k8s" else f"the image: of this machine it sees {job.workdir}"
    return [f"{job.config_file} was checked here, and the job reads {path}, which has to be the same file in {where}"]


def unprepared_data(job: Job) -> list[tuple[Path, str | None]]:
    """Directories without prepared data, each with the data config by which the job prepares them; None without one.

    Empty for a job in a container, whose files this machine may not see.
    """
    if job.container is not None:
        return []
    used = dict.fromkeys((Path(job.workdir, run.config.data.path), run.config.data.prepare) for run in job.runs)
    return [(path, config) for path, config in used if not (path / MANIFEST_NAME).is_file()]


def _is_below(file: Path, folder: str) -> bool:
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))
