"""Jobs of `muonlm submit --to slurm` under a real Slurm: a controller and two nodes, all on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONF = """\
ClusterName=muonlmtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
StateSaveLocation={base}/state
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmdSpoolDir={base}/spool.%n
SlurmdTimeout=30
KillWait=20
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 CoresPerSocket=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 CoresPerSocket=2 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def install() -> None:
    """Slurm from Debian's or Ubuntu's packages, once for all test processes; skips where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons and their installation need root")
    programs = ("slurmctld", "slurmd", "sbatch", "munged")
    if all(shutil.which(name) for name in programs):
        return
    if shutil.which("apt-get") is None:
        pytest.skip(f"no {', '.join(programs)} here, and no apt-get to install them")
    with FileLock(str(Path(tempfile.gettempdir()) / "muonlm-apt.lock")):
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, timeout=240, check=False
            )
            if done.returncode:
                pytest.skip(f"apt-get {command[0]} failed: {done.stderr[-500:]}")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def until(is_true: Callable[[], Any], timeout_s: float, what: str) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := is_true()):
        assert time.monotonic() < end, f"{what} took more than {timeout_s} s"
        time.sleep(0.2)
    return value


@dataclass
class Cluster:
    """A running Slurm: `environment` leads its commands to it."""

    base: Path
    environment: dict[str, str]

    def call(self, *command: str | Path, cwd: Path | None = None, expect: int = 0) -> str:
        done = subprocess.run(
            list(command), env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == expect, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, cwd: Path, *arguments: str, expect: int = 0) -> str:
        """The job's id; its message where it is expected to fail."""
        said = self.call(sys.executable, "-m", "muonlm", "submit", "--to", "slurm", *arguments, cwd=cwd, expect=expect)
        return said.split()[-1] if expect == 0 else said

    def state(self, job: str) -> dict[str, str]:
        """JobState, Restarts and the rest of what Slurm knows of a job."""
        return dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", job).split() if "=" in word)

    def wait(self, job: str, timeout_s: float) -> dict[str, str]:
        """Wait until a job (each task of an array) has ended, and return its state, which must be COMPLETED."""

        def ended() -> dict[str, str] | None:
            state = self.state(job)
            return None if state["JobState"] in {"PENDING", "RUNNING", "COMPLETING", "REQUEUED"} else state

        state = until(ended, timeout_s, f"job {job}")
        assert state["JobState"] == "COMPLETED", f"{state}\n{self.logs()}"
        return state

    def logs(self) -> str:
        """What the daemons and the jobs said, for a test that fails."""
        files = [*self.base.glob("*.log"), *self.base.rglob("job*.log"), *self.base.rglob("slurm-*.log")]
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in files)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A controller and nodes n1 and n2 with a key, socket, ports and state of their own."""
    install()
    base = Path(tempfile.mkdtemp(prefix="muonlm-slurm-"))
    base.chmod(0o755)  # munge wants a socket that all can reach
    for name in ("state", "spool.n1", "spool.n2"):
        (base / name).mkdir()
    (base / "munge.key").write_bytes(os.urandom(128))
    (base / "munge.key").chmod(0o400)
    conf = base / "slurm.conf"
    conf.write_text(CONF.format(base=base, host=socket.gethostname().split(".")[0], ports=free_ports(3)))
    files = [f"--{key}={base}/munge.{key.split('-')[0]}" for key in ("socket", "key-file", "pid-file", "seed-file")]
    daemons = [
        ["munged", "--foreground", "--force", *files],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf), "-N", "n1"],
        ["slurmd", "-D", "-f", str(conf), "-N", "n2"],
    ]
    environment = {**os.environ, "SLURM_CONF": str(conf), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    running = []
    cluster = Cluster(base, environment)
    try:
        for number, command in enumerate(daemons):
            log = (base / f"{number}-{command[0]}.log").open("w")
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            if command[0] == "munged":
                until((base / "munge.socket").exists, 20, "munged")
        until(lambda: _count_idle(environment) == 2, 60, "two idle nodes")
        yield cluster
    finally:
        if len(running) == len(daemons):
            subprocess.run(["scancel", "--me"], env=environment, timeout=20, check=False)
            time.sleep(1)
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(base, ignore_errors=True)


def _count_idle(environment: dict[str, str]) -> int:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%t"], env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout.split().count("idle")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if record["kind"] in ("train", "eval")]


def preemptions(run: Path) -> list[str]:
    """The signals that ended earlier attempts, in order."""
    events = [record for record in records(run) if record["kind"] == "event" and record["event"] == "preempted"]
    return [event["details"]["signal"] for event in events]


def ranks_of(name: str) -> list[int]:
    """Process numbers of the ranks of the run of that name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if f"name={name}".encode() in words and b"torch.distributed.run" not in words and b"bash" not in words:
            found.append(int(path.parent.name))
    return found


def progress(run: Path) -> tuple[int, int]:
    """Attempt and step; zeros before the first one."""
    try:
        status = json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return 0, 0
    return status["attempt"], status["step"]


def test_preempted_twice_in_two_ways_ends_as_uninterrupted(cluster: Cluster, write_config: Callable[..., None]) -> None:
    folder = cluster.base / "a folder"  # with a space, which every script has to quote
    steps = 300
    write_config(folder, "job", steps=steps)
    options = ("job.toml", "--nodes", "2", "--ranks-per-node", "1", "--sbatch=--comment=two words", "--partition=main")
    job = cluster.submit(folder, *options, "--time", "1", "--grace", "20", "name=job-cut")
    cut = folder / "runs" / "job-cut"
    until(lambda: progress(cut)[1] > 10, 90, "the first steps")
    cluster.call("scontrol", "requeue", job)
    # Slurm looks at time limits every 30 s and signals within 10 to 40 s of the start. Until then the ranks are held.
    until(lambda: progress(cut)[0] == 2, 90, "the second attempt")
    resumed = progress(cut)[1]
    until(lambda: progress(cut)[1] > resumed + 10, 60, "its first steps")
    held = ranks_of("job-cut")
    for rank in held:
        os.kill(rank, signal.SIGSTOP)
    # Slurm sends CONT before the signal.
    until(lambda: len(preemptions(cut)) == 2, 120, "the signal before the time limit")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    for rank in held:  # they still wait where a slow start had that signal before its first steps
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)
    state = cluster.wait(job, 240)
    whole = cluster.submit(folder, *options, "name=job-whole")
    cluster.wait(whole, 240)

    signals = preemptions(cut)
    # The first rank writes down its own signal, or that another rank was faster.
    assert signals[0] in ("SIGTERM", "of another rank")  # requeued
    assert signals[1] in ("SIGUSR1", "of another rank")  # the time limit
    assert int(state["Restarts"]) == len(signals) >= 2
    assert len(losses(cut)) == steps + 1
    assert losses(cut) == losses(folder / "runs" / "job-whole")
    logs = sorted(path.name for path in (cut / "logs").glob("slurm-*-node-*.log"))
    assert logs[:2] == [f"slurm-{job}.0-node-0.log", f"slurm-{job}.0-node-1.log"]
    assert len(logs) == 2 * (len(signals) + 1)
    assert "2 ranks over gloo" in (cut / "logs" / logs[0]).read_text() + (cut / "logs" / logs[1]).read_text()
    batch = (folder / f"job-cut-{job}.log").read_text()
    assert f"finished at step {steps}" in batch
    assert "queued again" in batch  # by the script itself, which a requeue from outside kills


def page_commands(word: str) -> list[str]:
    """The commands of the block of docs/slurm.md that has this word."""
    page = (ROOT / "docs" / "slurm.md").read_text()
    [block] = [block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if word in block]
    return [line.split("  #")[0].strip() for line in block.splitlines()]


def link_data(folder: Path, data: Path) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "stdlib").symlink_to(data)


def test_commands_of_the_page(cluster: Cluster, stdlib_data: Path) -> None:
    folder = cluster.base / "page"
    link_data(folder, stdlib_data)
    submit, queue, requeue, cancel = page_commands("squeue")
    job = cluster.submit(folder, *shlex.split(submit)[4:], "loop.steps=20000", "track.interval_steps=1")
    assert job in cluster.call(*shlex.split(queue))
    run = folder / "runs" / "smoke"
    until(lambda: progress(run)[1] > 3, 90, "the first steps")
    cluster.call(*shlex.split(requeue.replace("JOB", job)))
    until(lambda: progress(run)[0] == 2, 90, "the second attempt")
    cluster.call(*shlex.split(cancel.replace("JOB", job)))
    until(lambda: cluster.state(job)["JobState"] == "CANCELLED", 60, "the end")
    until(lambda: json.loads((run / "status.json").read_text())["state"] == "preempted", 30, "saving")
    assert (run / "checkpoints" / f"step_{progress(run)[1]:08d}" / "complete.json").exists()


def test_an_array_trains_the_arms_of_a_comparison(cluster: Cluster, stdlib_data: Path) -> None:
    folder = cluster.base / "arms"
    link_data(folder, stdlib_data)
    [line] = page_commands("--each")
    job = cluster.submit(folder, *shlex.split(line)[4:], "track.interval_steps=1")
    for task in (f"{job}_0", f"{job}_1"):
        cluster.wait(task, 120)
    muon, adamw = (losses(folder / "runs" / arm) for arm in ("muon", "adamw"))
    assert len(muon) == len(adamw) > 30
    assert muon[0] == adamw[0]  # the same initialisation and data
    assert muon[-1] != adamw[-1]


def test_what_slurm_refuses_is_an_error_with_its_reason(cluster: Cluster, write_config: Callable[..., None]) -> None:
    folder = cluster.base / "refused"
    write_config(folder, "job", steps=40)
    base = ("job.toml", "--ranks-per-node", "1")
    assert "invalid partition specified: nowhere" in cluster.submit(folder, *base, "--partition=nowhere", expect=2)
    assert "sbatch refused the job" in cluster.submit(folder, *base, "--sbatch=--no-such-option", expect=2)
    assert "refused" not in cluster.call("squeue", "-h", "-o", "%Z")  # its working directory


def test_copies_without_torchrun_are_refused(cluster: Cluster, write_config: Callable[..., None]) -> None:
    folder = cluster.base / "copies"
    write_config(folder, "job", steps=40)
    train = ("-m", "muonlm", "train", "job.toml")
    said = cluster.call("srun", "--nodes=2", "--ntasks=2", sys.executable, *train, cwd=folder, expect=2)
    assert "Slurm has 2 tasks here (SLURM_STEP_NUM_TASKS), but WORLD_SIZE is not set" in said
    assert not (folder / "runs").exists()


def test_a_run_that_fails_fails_the_job_and_shows_why(cluster: Cluster, write_config: Callable[..., None]) -> None:
    folder = cluster.base / "failing"
    write_config(folder, "job", steps=40)
    options = (
        "job.toml",
        "--ranks-per-node",
        "1",
        "--max-restarts",
        "0",
        "name=job-fails",
        "track.reference=runs/none",
    )
    job = cluster.submit(folder, *options)
    state = until(lambda: (s := cluster.state(job))["JobState"] in {"FAILED", "COMPLETED"} and s, 60, "the failure")
    assert state["JobState"] == "FAILED"
    log = (folder / f"job-fails-{job}.log").read_text()
    assert "runs/none" in log
    assert "failed, exit status 1" in log
