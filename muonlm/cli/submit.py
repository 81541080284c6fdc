"""`muonlm submit`: start a run under torchrun, Slurm or Kubernetes, from one set of templates."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonlm.cli.parser import add_config
from muonlm.cli.plan import find_vocab_size
from muonlm.config.errors import UserError

if TYPE_CHECKING:
    from muonlm.launch.job import Job


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "submit",
        keys_of="train",
        help="start a run on several processes: torchrun, Slurm or Kubernetes",
        description=(
            "Check a config for the machines that are asked for, write the script that trains it there, and\n"
            "submit it. Details and troubleshooting: docs/multi-node.md, docs/slurm.md."
        ),
    )
    add_config(parser, "train", dry_run=False)
    add = parser.add_argument
    add("--to", required=True, choices=("torchrun", "slurm", "k8s"), help="who starts it")
    add("--dry-run", action="store_true", help="print the script and submit nothing")
    add("--nodes", type=_whole(1), default=1, metavar="N", help="number of nodes; 1 by default")
    add("--gpus-per-node", type=_whole(1), metavar="G", help="GPUs of each node, a rank each")
    add("--ranks-per-node", type=_whole(1), metavar="R", help="ranks of each node that compute on CPUs")
    add("--cpus-per-node", type=_whole(1), metavar="C", help="cores of each node; whole nodes otherwise (slurm)")
    add("--elastic", type=_whole(1), metavar="MIN", help="go on with as few as MIN nodes (torchrun)")
    add("--head", metavar="HOST:PORT", help="where several nodes meet: an address of the first one (torchrun)")
    add("--time", help="time limit, as sbatch takes it; the run queues again and goes on (slurm)")
    add("--partition", help="partition (slurm)")
    add("--sbatch", action="append", default=[], metavar="=--OPTION", help="further option of sbatch; may repeat")
    add("--each", action="append", default=[], metavar="'KEY=VALUE ...'", help="one task of an array job; may repeat")
    add("--container", metavar="IMAGE", help="image with muonlm: *.sif for Apptainer, else pyxis (slurm); any (k8s)")
    add("--volume", metavar="CLAIM", help="claim of the volume to run in (k8s)")
    add("--workdir", metavar="DIR", help="where the job runs; here by default, /workspace in k8s")
    add("--interface", metavar="NAME", help="network interface for NCCL's and gloo's sockets, the same on all nodes")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="variable of the ranks; may repeat")
    add("--grace", type=_whole(1), default=120, metavar="S", help="seconds between stop signal and end; 120 by default")
    add("--max-restarts", type=_whole(0), default=3, metavar="N", help="restarts after a failure; 3 by default")
    add("--python", metavar="FILE", help="interpreter that has muonlm; this one by default, python3 in a container")
    add("--templates", type=Path, metavar="DIR", help="folder with own versions of files of launch/")
    add("--gpu", metavar="NAME", help="refuse a run that cannot fit on this GPU (names: muonlm plan --help)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the job, then print or submit it."""
    from muonlm.launch.here import assumed, missing, unprepared_data
    from muonlm.launch.job import check
    from muonlm.launch.scripts import render
    from muonlm.launch.send import send

    job = _job(args)
    check(job)
    for problem in missing(job):
        if not args.dry_run:
            raise UserError(problem)
        print(problem, file=sys.stderr)
    for path, config in unprepared_data(job):
        if args.dry_run:
            print(_unprepared(path, config), file=sys.stderr)
        elif config is None:
            raise UserError(_unprepared(path, config))
    for assumption in assumed(job):
        print(assumption, file=sys.stderr)
    if args.gpu:
        _check_memory(job, args.gpu)
    script = render(job)
    print(script if args.dry_run else send(job, script), end="" if args.dry_run else "\n")
    return 0


def _job(args: argparse.Namespace) -> Job:
    from muonlm.config.load import load_train
    from muonlm.launch.here import find_own, name_in_job
    from muonlm.launch.job import Job, load_runs

    if (args.gpus_per_node is None) == (args.ranks_per_node is None):
        raise UserError("give either --gpus-per-node, or --ranks-per-node for ranks that compute on CPUs")
    if args.templates and not args.templates.is_dir():
        raise UserError(f"--templates {args.templates}: no such folder")
    workdir = (args.workdir or "/workspace") if args.to == "k8s" else os.path.abspath(args.workdir or ".")
    own = find_own(args.config)
    in_job = name_in_job(args.config, own, target=args.to, container=args.container, workdir=workdir)
    return Job(
        target=args.to,
        name=load_train(args.config, args.overrides).name,
        runs=load_runs(args.config, args.overrides, [_split(text) for text in args.each], in_job=in_job),
        nodes=args.nodes,
        ranks_per_node=args.gpus_per_node or args.ranks_per_node,
        gpus_per_node=args.gpus_per_node or 0,
        min_nodes=args.elastic or 0,
        cpus_per_node=args.cpus_per_node,
        head=args.head,
        time=args.time,
        partition=args.partition,
        options=tuple(args.sbatch),
        container=args.container,
        volume=args.volume,
        interface=args.interface,
        env=tuple(_variable(text) for text in args.env),
        grace_s=args.grace,
        max_restarts=args.max_restarts,
        python=_python(args),
        workdir=workdir,
        templates=args.templates and args.templates.absolute(),
        config_file=own,
    )


def _python(args: argparse.Namespace) -> str:
    """A path from here, unless it is one in a container."""
    if args.container:
        return args.python or "python3"
    return os.path.abspath(args.python) if "/" in (args.python or "") else args.python or sys.executable


def _unprepared(path: Path, config: str | None) -> str:
    if config is not None:
        return f"no prepared data in {path} yet: the job prepares them at its start (data.prepare={config})"
    return (
        f"no prepared data in {path}, and data.prepare names no config that would write them; muonlm data prepare ... "
        f"output={path} does, and --workdir says where relative paths begin"
    )


def _check_memory(job: Job, gpu: str) -> None:
    """Raises UserError where the forecast of a run exceeds the memory of that GPU."""
    from muonlm.plan.fit import check_fits
    from muonlm.plan.hardware import Machines, find_device

    if not job.gpus_per_node:
        raise UserError(f"--gpu {gpu} goes with --gpus-per-node")
    machines = Machines(gpu, find_device(gpu), job.ranks_per_node)
    for each in job.runs:
        check_fits(
            each.config,
            world_size=job.nodes * job.ranks_per_node,
            vocab_size=find_vocab_size(each.config, None),
            memory_bytes=machines.usable_bytes,
            device="cuda",
        )
    print(f"{job.name}: fits on {job.nodes} x {job.ranks_per_node} {gpu}", file=sys.stderr)


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--each {text!r}: {error}") from None


def _variable(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not (name.isascii() and name.isidentifier()):
        raise UserError(f"--env {text} is not NAME=VALUE")
    return name, value


def _whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= 10**9):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to 10^9")
        return int(text)

    return parse
