"""From a job to the text that is submitted. The templates are in `launch/` of the checkout, else in the wheel.

Imports no torch.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jinja2

import muonlm
from muonlm.launch.job import Job

_TEMPLATES = {"torchrun": "torchrun.sh.j2", "slurm": "slurm.sbatch.j2", "k8s": "kubernetes.yaml.j2"}
_ELASTIC_LAST_CALL_S = 30


def render(job: Job) -> str:
    """The script for bash or sbatch, or the objects for kubectl, as text that stands on its own.

    Values from the command line are quoted for the shell. Raises jinja2's errors for a broken template.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_folders(job.templates)),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["q"] = shlex.quote
    is_elastic = bool(job.min_nodes)
    values = {
        **{key: getattr(job, key) for key in job.__dataclass_fields__},
        "container_kind": job.container_kind,
        "nnodes": f"{job.min_nodes}:{job.nodes}" if is_elastic else job.nodes,
        "elastic_min": job.min_nodes,
        "last_call_s": _ELASTIC_LAST_CALL_S if is_elastic else 5,
        "env": _env(job),
        "options": _options(job),
        "python": job.python if job.container is None else "python3",
        "k8s_name": re.sub(r"[^a-z0-9-]+", "-", job.name.lower()).strip("-"),
    }
    values["network"] = _read(environment, "nccl.env").rstrip()
    values["node"] = environment.get_template("node.sh.j2").render(values).strip()
    if job.target == "k8s":
        values["script"] = environment.get_template("pod.sh.j2").render(values).strip()
    return environment.get_template(_TEMPLATES[job.target]).render(values).rstrip() + "\n"


def _folders(own: Path | None) -> list[Path]:
    package = Path(muonlm.__file__).resolve().parent
    return [*([own] if own else []), package.parent / "launch", package / "_launch"]


def _read(environment: jinja2.Environment, name: str) -> str:
    """A file as it is: what looks like a placeholder in it stays."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _env(job: Job) -> dict[str, str]:
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if job.interface else ()
    return {**dict.fromkeys(names, job.interface or ""), **dict(job.env)}


def _options(job: Job) -> list[str]:
    """Options of sbatch, quoted as it reads them from a `#SBATCH` line."""
    known = {"--time": job.time, "--partition": job.partition}
    pairs = [*known.items(), *(option.partition("=")[::2] for option in job.options)]
    return [f"{key}={shlex.quote(value)}" if value else key for key, value in pairs if value is not None]
