"""From a job to the text that is submitted. The templates are in `launch/` of the checkout, else in the wheel.

Imports no torch.
"""

from __future__ import annotations

import re
import shlex
import traceback
from pathlib import Path

import jinja2

import muonlm
from muonlm.config.errors import UserError
from muonlm.launch.job import Job

_TEMPLATES = {"torchrun": "torchrun.sh.j2", "slurm": "slurm.sbatch.j2", "k8s": "kubernetes.yaml.j2"}
_ELASTIC_LAST_CALL_S = 30


def render(job: Job) -> str:
    """The script for bash or sbatch, or the objects for kubectl, as text that stands on its own.

    Values from the command line are quoted for the shell. Raises UserError with file and line for a broken template of
    the user's own.
    """
    try:
        return _render(job)
    except Exception as error:
        place = job.templates and _place(error, job.templates)
        if not place:
            raise
        raise UserError(f"{place}: {type(error).__name__}: {getattr(error, 'message', None) or error}") from None


def _place(error: Exception, folder: Path) -> str | None:
    """Where in the files of a folder an error came from, of which jinja2 makes frames; None for one from elsewhere."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
    if frames:
        return f"{frames[-1].filename}, line {frames[-1].lineno}"
    return f"--templates {folder}" if isinstance(error, (OSError, UnicodeDecodeError)) else None


def _render(job: Job) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_folders(job.templates)),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["q"] = _quote
    is_elastic = bool(job.min_nodes)
    values = {
        **{key: getattr(job, key) for key in job.__dataclass_fields__},
        "container_kind": job.container_kind,
        "nnodes": f"{job.min_nodes}:{job.nodes}" if is_elastic else job.nodes,
        "elastic_min": job.min_nodes,
        "last_call_s": _ELASTIC_LAST_CALL_S if is_elastic else 5,
        "env": _env(job),
        "options": _options(job),
        "k8s_name": job.k8s_name,
    }
    values["network"] = _read(environment, "nccl.env").rstrip()
    values["node"] = environment.get_template("node.sh.j2").render(values).strip()
    if job.target == "k8s":
        values["script"] = environment.get_template("pod.sh.j2").render(values).strip()
    return environment.get_template(_TEMPLATES[job.target]).render(values).rstrip() + "\n"


def _quote(text: str) -> str:
    """A word for bash, in double quotes where shellcheck suspects single ones (SC2016, SC1003, SC1112)."""
    if not set(text) & set("$`\\\u2018\u2019"):
        return shlex.quote(text)
    return '"' + re.sub(r'([$`"\\])', r"\\\1", text) + '"'


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
