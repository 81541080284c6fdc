"""Hand a rendered job to the program that runs it."""

from __future__ import annotations

import os
import shutil
import subprocess

from muonlm.config.errors import UserError
from muonlm.launch.job import Job

_PROGRAMS = {"slurm": ("sbatch",), "k8s": ("kubectl", "apply", "-f", "-"), "torchrun": ("bash",)}


def send(job: Job, script: str) -> str:
    """Submit the job and return what sbatch or kubectl said; torchrun takes the place of this process instead.

    Raises UserError where the program is not here, or refuses the job.
    """
    command = _PROGRAMS[job.target]
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not on this machine's PATH: submit from one where it is, or print the job with --dry-run"
        )
    if job.target == "torchrun":
        os.execvp("bash", ["bash", "-c", script, "bash"])
    # sbatch writes the output where it is called; the directory of a pod need not be on this machine.
    cwd = job.workdir if job.target == "slurm" else None
    done = subprocess.run(command, input=script, capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise UserError(f"{command[0]} refused the job: {said}\nsee what it was given with --dry-run")
    return done.stdout.strip()
