"""Two hosts with a network between them, made of namespaces: `muonlm submit --to torchrun` on each of them."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
MORE = """\
[checkpoint]
interval_steps = 10
[dist]
timeout_s = 8
"""


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass
class Hosts:
    """Two network namespaces, with the interface eth0, an address, and a name that resolves to loopback."""

    names: list[str]
    addresses: list[str]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, index: int, *command: str, cwd: Path) -> subprocess.Popen[str]:
        """Run a command on a host; its output goes to hostN.log in `cwd`."""
        ranks = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        where = ["ip", "netns", "exec", self.names[index], "unshare", "--uts", "bash", "-c"]
        named = [f'hostname {self.names[index]}; exec "$@"', "bash", *command]
        with (cwd / f"host{index}.log").open("a") as log:
            process = subprocess.Popen(
                [*where, *named],
                cwd=cwd,
                env={**os.environ, **ranks},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        return process

    def train(self, cwd: Path, *arguments: str, without: tuple[str, ...] = ()) -> list[subprocess.Popen[str]]:
        """The command of docs/multi-node.md on both, for hosts.toml, without some of its words."""
        page = (ROOT / "docs" / "multi-node.md").read_text()
        [line] = [line for line in page.splitlines() if line.startswith("muonlm submit") and "name=hosts" in line]
        words = [word for word in shlex.split(line.replace(" smoke ", " hosts.toml ")) if word not in without]
        assert f"{self.addresses[0]}:29400" in words
        return [self.start(index, sys.executable, "-m", *words, *arguments, cwd=cwd) for index in range(2)]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Made anew for each test, because tests take the link down."""
    if os.geteuid() != 0 or sys.platform != "linux" or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need Linux, root, and the commands ip (iproute2) and unshare")
    tag = f"{os.getpid() % 100000}"
    names, addresses = [f"mh{tag}a", f"mh{tag}b"], ["10.77.0.1", "10.77.0.2"]
    bridge = f"mbr{tag}"
    hosts = Hosts(names, addresses)
    try:
        try:
            ip("link", "add", bridge, "type", "bridge")
        except AssertionError as error:
            pytest.skip(f"this machine makes no bridges: {error}")
        ip("link", "set", bridge, "up")
        for name, address in zip(names, addresses, strict=True):
            ip("netns", "add", name)
            ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"v{name}", "master", bridge, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")  # as Debian's installer does
        yield hosts
    finally:
        for process in hosts.processes:
            process.terminate()
        for process in hosts.processes:
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in names:
            for process_id in _processes_in(name):
                os.kill(process_id, 9)
            # By itself the kernel removes it some time after the namespace.
            subprocess.run(["ip", "link", "del", f"v{name}"], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def _processes_in(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def until(is_true: Callable[[], Any], timeout_s: float, what: Callable[[], str]) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


def said(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-5000:]}" for path in sorted(folder.glob("host*.log")))


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if record["kind"] in ("train", "eval")]


def step_of(run: Path) -> int:
    try:
        return json.loads((run / "status.json").read_text())["step"]
    except FileNotFoundError:
        return -1


def alone(folder: Path, *arguments: str) -> None:
    """The same config here, with torchrun's ranks on one host (`--ranks-per-node`) or in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "muonlm", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def ended(processes: list[subprocess.Popen[str]], folder: Path, timeout_s: float) -> list[int]:
    """Exit codes of all."""
    until(lambda: all(p.poll() is not None for p in processes), timeout_s, lambda: said(folder))
    return [process.returncode for process in processes]


def test_two_hosts_train_as_one_process_and_survive_a_lost_link(
    hosts: Hosts, write_config: Callable[..., None], tmp_path: Path
) -> None:
    steps = 250
    write_config(tmp_path, "hosts", steps=steps, more=MORE)
    jobs = hosts.train(tmp_path, "name=hosts-cut", "loop.micro_batch_size=8")
    cut = tmp_path / "runs" / "hosts-cut"
    until(lambda: step_of(cut) > 25 or any(job.poll() is not None for job in jobs), 90, lambda: said(tmp_path))
    ip("link", "set", f"v{hosts.names[1]}", "down")
    begin = time.monotonic()
    time.sleep(14)  # longer than dist.timeout_s, so that both sides give up
    stopped_at = step_of(cut)
    ip("link", "set", f"v{hosts.names[1]}", "up")
    assert ended(jobs, tmp_path, 150) == [0, 0], said(tmp_path)
    print(f"finished {time.monotonic() - begin:.0f} s after the link went down at step {stopped_at}")

    assert 25 < stopped_at < steps
    attempts = [record["details"]["attempt"] for record in records(cut) if record.get("event") in ("start", "resume")]
    assert len(attempts) >= 2, said(tmp_path)
    assert "ranks over gloo on 2 hosts" in said(tmp_path)

    two_ranks = ("submit", "--to", "torchrun", "hosts.toml", "--ranks-per-node", "2")
    alone(tmp_path, *two_ranks, "name=hosts-whole", "loop.micro_batch_size=8")
    assert len(losses(cut)) == steps + 1
    assert losses(cut) == losses(tmp_path / "runs" / "hosts-whole")
    alone(tmp_path, "train", "hosts.toml", "name=hosts-one", "loop.micro_batch_size=8")
    one = losses(tmp_path / "runs" / "hosts-one")
    assert max(abs(a - b) for a, b in itertools.zip_longest(one, losses(cut), fillvalue=9.0)) < 1e-4


def test_one_host_finishes_what_the_other_one_leaves(
    hosts: Hosts, write_config: Callable[..., None], tmp_path: Path
) -> None:
    steps = 150
    write_config(tmp_path, "hosts", steps=steps, more=MORE)
    jobs = hosts.train(tmp_path, "--elastic", "1", "name=hosts-left", "loop.micro_batch_size=8")
    left = tmp_path / "runs" / "hosts-left"
    until(lambda: step_of(left) > 25, 90, lambda: said(tmp_path))
    for process in _processes_in(hosts.names[1]):
        os.kill(process, 9)
    assert ended(jobs, tmp_path, 200)[0] == 0, said(tmp_path)
    alone(tmp_path, "train", "hosts.toml", "name=hosts-one", "loop.micro_batch_size=8")
    one, two = losses(tmp_path / "runs" / "hosts-one"), losses(left)
    assert len(one) == len(two) == steps + 1
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4


def test_a_name_that_resolves_to_loopback_is_an_error_that_says_what_to_set(
    hosts: Hosts, write_config: Callable[..., None], tmp_path: Path
) -> None:
    write_config(tmp_path, "hosts", steps=10, more=MORE)
    jobs = hosts.train(tmp_path, "--max-restarts", "0", "name=hosts-looped", without=("--interface", "eth0"))
    assert 0 not in ended(jobs, tmp_path, 90)
    assert "ranks 0 to 1 would use gloo over 127.0.1.1" in said(tmp_path)
    assert "GLOO_SOCKET_IFNAME=eth0" in said(tmp_path)


def test_a_head_whose_name_is_loopback_is_refused(
    hosts: Hosts, write_config: Callable[..., None], tmp_path: Path
) -> None:
    write_config(tmp_path, "hosts", steps=10, more=MORE)
    command = (sys.executable, "-m", "muonlm", "submit", "--to", "torchrun", "--nodes", "2", "--ranks-per-node", "1")
    job = hosts.start(0, *command, "hosts.toml", "--head", f"{hosts.names[0]}:29400", cwd=tmp_path)
    assert ended([job], tmp_path, 30) == [2]
    assert "give --head an IP address" in said(tmp_path)
