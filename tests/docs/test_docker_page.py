"""docs/docker.md: its commands run, or, where they need an engine, are what the image, compose and muonlm take."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from muonlm.cli.main import build_parser
from muonlm.cli.parser import take_overrides
from muonlm.config.load import load_train

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "docker.md").read_text()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
SERVICES = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
BLOCKS = [block.splitlines() for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
WITH_ENGINE = [line for block in BLOCKS if block[0] == "# Docker" for line in block[1:]]
WITHOUT_ENGINE = [line for block in BLOCKS if block[0] != "# Docker" for line in block]
IMAGES = {"muonlm", "muonlm:cpu"}
OTHER_PROGRAMS = {"muonlm", "torchrun", "python", "bash", "accelerate", "deepspeed"}
# Options without a value; of all others the value is the next word, or stands behind `=`.
FLAGS = {"--rm", "--init"}


def words_of(line: str) -> list[str]:
    """The words of a command, without variables that are set before it."""
    words = shlex.split(line)
    while "=" in words[0]:
        del words[0]
    return words


def after_options(words: list[str]) -> list[str]:
    """What follows the options of `docker run` or `docker compose run`."""
    while words[0].startswith("-"):
        del words[: 1 if words[0] in FLAGS or "=" in words[0] else 2]
    return words


def check_arguments(words: list[str]) -> None:
    """Arguments of the entry point: a command of muonlm, or torchrun of one. Raises SystemExit, UserError."""
    if words[0] == "torchrun":
        words = words[words.index("muonlm") + 1 :]
    assert words[0] not in OTHER_PROGRAMS
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    take_overrides(parser, args, rest)
    if args.command == "train":
        load_train(args.config, args.overrides)


def check(line: str) -> None:
    words = words_of(line)
    if words[:2] == ["docker", "build"]:
        assert words[words.index("-f") + 1] == "docker/Dockerfile"
        assert words[words.index("-t") + 1] in IMAGES
        assert words[-1] == "."
        given = [word.partition("=")[0] for before, word in pairwise(words) if before == "--build-arg"]
        assert set(given) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    elif words[:2] == ["docker", "run"]:
        image, *arguments = after_options(words[2:])
        assert image in IMAGES
        check_arguments(arguments)
    elif words[:4] == ["docker", "compose", "-f", "docker/compose.yaml"]:
        action, *rest = words[4:]
        assert action in ("build", "run")
        service, *arguments = after_options(rest)
        assert service in SERVICES
        if arguments:
            check_arguments(arguments)
    else:
        assert words[0] in ("mkdir", "export"), line


def test_there_is_much_to_check():
    assert len(WITH_ENGINE) >= 10
    assert len(WITHOUT_ENGINE) >= 2


@pytest.mark.parametrize("line", WITH_ENGINE)
def test_command_that_needs_an_engine_is_well_formed(line: str):
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "docker run --rm muonlm trian smoke",
        "docker run --rm muonlm train smok",
        "docker run --rm other train smoke",
        "docker build -f docker/Dockerfile -t muonlm --build-arg BASE=x .",
        "docker compose -f docker/compose.yaml run --rm gpu train smoke",
        "docker push muonlm",
    ],
)
def test_wrong_commands_are_found(line: str):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(line)


@pytest.mark.parametrize("line", [line for line in WITH_ENGINE if re.match(r"docker (run|build) ", line)])
def test_client_of_docker_knows_the_options(line: str):
    """It parses them before it looks for the engine, of which it is given a wrong address: nothing is started."""
    if not shutil.which("docker"):
        pytest.skip("no docker client here")
    environment = {
        **os.environ,
        "DOCKER_HOST": "unix:///nonexistent/docker.sock",
        "PWD": str(ROOT),
        "DOCKER_BUILDKIT": "0",
    }
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "flag" not in done.stderr, done.stderr
    assert "/nonexistent/docker.sock" in done.stderr, done.stderr


def test_commands_that_need_none_run(run_python):
    for line in WITHOUT_ENGINE:
        words = shlex.split(line)
        assert words[0] == "muonlm", f"no rule how to test: {line}"
        done = run_python("-m", *words)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert words[words.index("--container") + 1] in done.stdout


def test_table_of_arguments_is_that_of_the_dockerfile():
    rows = re.findall(r"^\| (`[A-Z`, _]+) \|", PAGE, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"[A-Z_]+", row)}
    assert listed == set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    for name, default in re.findall(r"^ARG (\w+)=(\S+)", DOCKERFILE, re.MULTILINE):
        (row,) = [line for line in PAGE.splitlines() if line.startswith("| ") and f"`{name}`" in line.split(" | ")[0]]
        assert default in row
