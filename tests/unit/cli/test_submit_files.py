"""`muonlm submit` and the files of this machine: it trains the config that was checked, or says what it assumes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import yaml

from muonlm.cli.main import main

POD = ("--container", "muonlm:1", "--volume", "runs")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Here, with a config called my.toml, and elsewhere, with another one of that name."""
    here, elsewhere = tmp_path / "a here", tmp_path / "elsewhere"
    for folder, steps in ((here, 5), (elsewhere, 7)):
        folder.mkdir()
        (folder / "my.toml").write_text(f'extends = ["smoke"]\nname = "mine"\n[loop]\nsteps = {steps}\n')
    monkeypatch.chdir(here)
    return here, elsewhere


def submit(capsys: pytest.CaptureFixture[str], target: str, config: str, *more: str) -> tuple[str, str]:
    """What a dry run prints to stdout and to stderr."""
    assert main(["submit", "--to", target, config, "--ranks-per-node", "2", "--dry-run", *more]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def config_of(script: str) -> str:
    [line] = [line for line in script.splitlines() if line.startswith("set -- ")]
    return shlex.split(line)[2]


@pytest.mark.parametrize("target", ["torchrun", "slurm"])
@pytest.mark.parametrize("given", ["my.toml", "my", "./my.toml", "../a here/my.toml"])
def test_a_job_elsewhere_gets_the_path_of_the_checked_file(
    given: str, target: str, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here, elsewhere = folders
    script, _ = submit(capsys, target, given, "--workdir", "../elsewhere")
    assert f"cd {elsewhere}\n" in script  # no relative path: sbatch is called there already
    assert (elsewhere / config_of(script)).samefile(here / "my.toml")


@pytest.mark.parametrize(
    ("given", "more"), [("my", ()), ("my.toml", ("--workdir", ".")), ("smoke", ("--workdir", "/"))]
)
def test_a_config_that_means_the_same_there_is_named_as_it_was(
    given: str, more: tuple[str, ...], folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert config_of(submit(capsys, "torchrun", given, *more)[0]) == given


@pytest.mark.parametrize("image", ["muonlm:1", "muonlm.sif"])
def test_a_container_reads_the_checked_file_below_the_directory_that_it_sees(
    image: str, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here, elsewhere = folders
    script, notes = submit(capsys, "slurm", "my.toml", "--container", image, "--workdir", "..")
    assert config_of(script) == "a here/my.toml"
    assert notes == ""
    script, notes = submit(capsys, "slurm", "my.toml", "--container", image, "--workdir", str(elsewhere))
    assert config_of(script) == str(here / "my.toml")
    expected = f"my.toml was checked here, and the job reads {here}/my.toml, which has to be the same file in the image"
    assert f"{expected}: of this machine it sees {elsewhere}\n" in notes


def test_a_pod_is_said_to_need_the_config_in_its_volume(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text, notes = submit(capsys, "k8s", "my.toml", *POD)
    container = list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][2] == "my.toml"
    assert "the job reads /workspace/my.toml, which has to be the same file in the image or the volume\n" in notes
    assert submit(capsys, "k8s", "smoke", *POD)[1] == ""


def test_kubectl_runs_although_the_directory_of_the_pods_is_not_here(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kubectl = folders[0] / "kubectl"
    kubectl.write_text("#!/bin/sh\necho created\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(folders[0]))
    words = ["submit", "--to", "k8s", "smoke", "--ranks-per-node", "2", *POD, "--workdir", "/no/such/folder"]
    assert main(words) == 0
    assert capsys.readouterr().out == "created\n"


@pytest.mark.parametrize("target", ["torchrun", "slurm"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workdir", "/no/such"), "--workdir /no/such: no such folder here"),
        (("--python", "no-such-python"), "--python no-such-python: no such program here"),
        (("--python", "/usr/bin/env python"), "--python /usr/bin/env python: no such program here"),
        (("data.prepare=./no.toml",), "data.prepare=./no.toml"),
    ],
)
def test_what_this_machine_lacks_is_refused_but_printed(
    words: tuple[str, ...],
    message: str,
    target: str,
    folders: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(folders[0]))  # without bash and sbatch: this starts nothing, whatever happens
    script, notes = submit(capsys, target, "smoke", *words)
    assert script.startswith("#!")
    assert message in notes
    assert main(["submit", "--to", target, "smoke", "--ranks-per-node", "2", *words]) == 2
    assert message in capsys.readouterr().err.partition("muonlm submit: error\n")[2]


def test_the_interpreter_is_found_from_the_directory_of_the_job(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here, elsewhere = folders
    (here / "python").symlink_to(sys.executable)
    script, notes = submit(capsys, "torchrun", "smoke", "--python", "./python", "--workdir", str(elsewhere))
    assert f"exec '{here}/python' -m" in script
    assert "--python" not in notes
    script, _ = submit(capsys, "slurm", "smoke", "--container", "x", "--python", "/opt/python")
    assert "exec /opt/python -m" in script
