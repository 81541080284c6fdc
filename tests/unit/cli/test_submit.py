"""`muonlm submit`: what its scripts say, that shells read them as meant, and what is refused before that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from muonlm.cli.main import main

TARGETS = {
    "torchrun": ["--gpus-per-node", "2"],
    "torchrun-nodes": ["--gpus-per-node", "1", "--nodes", "2", "--head", "10.0.0.1:29400", "--elastic", "1"],
    "slurm": [
        "--gpus-per-node",
        "2",
        "--nodes",
        "2",
        "--time",
        "1:00:00",
        "--partition",
        "a b",
        "--cpus-per-node",
        "8",
    ],
    "slurm-array": ["--ranks-per-node", "1", "--each", "name=a 'run_dir=runs/it is'", "--each", "name=b"],
    "slurm-pyxis": ["--gpus-per-node", "2", "--container", "registry.example/muonlm:1 x"],
    "slurm-apptainer": ["--gpus-per-node", "2", "--container", "a folder/muonlm.sif"],
    "k8s": ["--gpus-per-node", "2", "--nodes", "2", "--container", "muonlm:1", "--volume", "runs"],
}
POD = {"POD_IP": "1.2.3.4", "JOB_COMPLETION_INDEX": "0"}
AWKWARD = 'run_dir=runs/it\'s "$HOME" `id`'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose name has to be quoted."""
    path = tmp_path / "my runs"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def dry_run(capsys: pytest.CaptureFixture[str], target: str, *more: str) -> str:
    assert main(["submit", "--to", target.partition("-")[0], "smoke", *TARGETS[target], "--dry-run", *more]) == 0
    return capsys.readouterr().out


def shell_scripts(target: str, text: str) -> list[str]:
    """The scripts that some bash reads: that of a job, and those inside it."""
    if target == "k8s":
        job = list(yaml.safe_load_all(text))[1]
        return ["#!/usr/bin/env bash\n" + job["spec"]["template"]["spec"]["containers"][0]["args"][0]]
    if target.startswith("slurm"):
        inner = text.split("<<'END_OF_NODE_SCRIPT' || true\n")[1].split("END_OF_NODE_SCRIPT\n")[0]
        return [text, "#!/usr/bin/env bash\n" + inner]
    return [text]


def put_tool(folder: Path, name: str, body: str) -> None:
    """A program of that name for scripts that run with `with_tools`."""
    path = folder.parent / "tools" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def with_tools(folder: Path, **variables: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder.parent / 'tools'}:{os.environ['PATH']}", **variables}


def run_with_recorder(script: str, folder: Path, **variables: str) -> list[str]:
    """Run a script made with `--python recorder`; the arguments that this program got in place of torchrun's python.

    It also writes down the variable MARK, beside them, and dies of SIGUSR1 unless the script ignores it, as torchrun.
    """
    record = folder.parent / "record"
    put_tool(folder, "recorder", 'kill -USR1 $$; printf "%s\\0" "$@" >"$RECORD"; printf %s "${MARK:-}" >"$RECORD.env"')
    environment = with_tools(folder, RECORD=str(record), **variables)
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return record.read_text().split("\0")[:-1]


@pytest.mark.parametrize("target", TARGETS)
def test_scripts_are_clean_under_shellcheck(target: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = [f"--env={value}" for value in ("A=it's", "B=`x`", "C=it’s", "D=x\\")]
    awkward = (AWKWARD + " $(y) ${z}", "--python", "/a $b/python", *env)
    scripts = shell_scripts(target, dry_run(capsys, target, *awkward))
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here (Debian: apt-get install shellcheck)")
    for script in scripts:
        done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_arguments_reach_torchrun_as_they_were_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    escapes = r"data.path=\ \\ \$HOME \" $(id) ’` ${x} !"
    mark = "a 'b' $c \\"
    script = dry_run(capsys, "torchrun", "--python", "recorder", "--env", f"MARK={mark}", AWKWARD, escapes, "name=x")
    words = run_with_recorder(script, folder)
    assert words[-6:] == ["muonlm", "train", "smoke", AWKWARD, escapes, "name=x"]
    assert "--nproc-per-node=2" in words
    assert "--standalone" in words
    assert (folder.parent / "record.env").read_text() == mark


def test_two_nodes_meet_at_the_head_and_only_the_head_serves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = dry_run(capsys, "torchrun-nodes")
    assert "--nnodes=1:2" in script
    assert '--rdzv-endpoint="$head"' in script
    node = shell_scripts("slurm", dry_run(capsys, "slurm", "--python", "recorder"))[1]
    for number, is_host in ((0, "1"), (1, "0")):
        slurm = {"SLURM_NODEID": str(number), "SLURM_JOB_ID": "71234", "SLURM_RESTART_COUNT": "2"}
        words = run_with_recorder(node, folder, MUONLM_NODE_ADDRESSES="10.0.0.7 10.0.0.8 ", **slurm)
        assert "--rdzv-endpoint=10.0.0.7:21234" in words
        assert f"--local-addr=10.0.0.{7 + number}" in words
        assert "--rdzv-id=71234-2" in words
        assert any(word.startswith(f"--rdzv-conf=is_host={is_host},") for word in words)


def test_sbatch_asks_for_what_was_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = dry_run(capsys, "slurm", "--sbatch=--qos=high", "--sbatch=--comment=two words", "--grace", "90", "name=x")
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert lines == [
        "--job-name=x",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=2",
        "--cpus-per-task=8",
        "--time=1:00:00",
        "--partition='a b'",
        "--qos=high",
        "--comment='two words'",
        "--signal=USR1@90",
        "--requeue",
        "--open-mode=append",
        "--output=x-%j.log",
    ]
    assert f"cd '{folder}'" in script


def test_kubernetes_job_is_complete(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service, job = yaml.safe_load_all(dry_run(capsys, "k8s", "name=My.run", AWKWARD))
    name = "my-run"
    assert service["metadata"]["name"] == job["metadata"]["name"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert pod["subdomain"] == name
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert container["args"][1:] == ["muonlm", "smoke", "name=My.run", AWKWARD]
    assert f"head={name}-0.{name}:29400" in container["args"][0]


@pytest.mark.parametrize("name", ["null", "on", "a" * 61, "x_1.2_"])
def test_names_that_kubernetes_takes_stay(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service, job = yaml.safe_load_all(dry_run(capsys, "k8s", f"name={name}"))
    expected = name.replace("_", "-").replace(".", "-").rstrip("-")
    assert service["metadata"]["name"] == service["spec"]["selector"]["job-name"] == expected
    assert job["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"] == expected


@pytest.mark.parametrize(
    ("state", "code"), [("finished", 0), ("preempted", 75), ("running", 1)], ids=lambda value: str(value)
)
def test_pod_starts_again_unless_the_run_is_finished(
    state: str, code: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = dry_run(capsys, "k8s")
    [script] = shell_scripts("k8s", text)
    (folder / "runs" / "smoke").mkdir(parents=True)
    put_tool(folder, "python3", f'echo \'"state": "{state}"\' >runs/smoke/status.json; exit 1')
    command = ["bash", "-c", script, "muonlm", "smoke"]
    assert subprocess.run(command, env=with_tools(folder, **POD), cwd=folder, check=False).returncode == code
    policy = list(yaml.safe_load_all(text))[1]["spec"]["podFailurePolicy"]["rules"][0]
    assert policy["onExitCodes"]["values"] == [75]


def test_pod_that_is_evicted_waits_until_its_ranks_have_saved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [script] = shell_scripts("k8s", dry_run(capsys, "k8s"))
    (folder / "runs" / "smoke").mkdir(parents=True)
    slow = 'trap "sleep 0.3; echo \'\\"state\\": \\"preempted\\"\' >runs/smoke/status.json; exit 1" TERM; touch up; '
    put_tool(folder, "python3", slow + "while true; do sleep 0.05; done")
    pod = subprocess.Popen(["bash", "-c", script, "muonlm", "smoke"], env=with_tools(folder, **POD), cwd=folder)
    try:
        end = time.monotonic() + 20
        while not (folder / "up").exists() and time.monotonic() < end:
            time.sleep(0.02)
        pod.terminate()
        assert pod.wait(20) == 75
    finally:
        pod.kill()


def attempt(script: str, folder: Path, number: int, status: str) -> subprocess.CompletedProcess[str]:
    """Run a job script with an `srun` that leaves this status.json (empty: none), and a `scontrol` that takes notes."""
    write = f"printf %s '{status}' >runs/smoke/status.json; " if status else ""
    put_tool(folder, "srun", write + "echo 'muonlm train: error' >runs/smoke/logs/slurm-7.0-node-0.log; exit 3")
    put_tool(folder, "scontrol", f'[ "$1" = show ] && echo " NodeAddr=h" || echo "$@" >>"{folder}/requeued"')
    slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(number), "SLURM_JOB_NODELIST": "h"}
    environment = with_tools(folder, **slurm)
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_job_queues_again_until_the_run_is_finished(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = dry_run(capsys, "slurm")
    for number, step in enumerate((5, 5, 9)):
        done = attempt(script, folder, number, json.dumps({"state": "preempted", "step": step}, indent=1))
        assert done.returncode == 0, done.stderr
        assert f"saved at step {step}, queued again" in done.stdout
    assert (folder / "requeued").read_text() == "requeue 7\n" * 3
    done = attempt(script, folder, 3, json.dumps({"state": "finished", "step": 30}, indent=1))
    assert done.returncode == 0
    assert "finished at step 30" in done.stdout
    assert (folder / "requeued").read_text() == "requeue 7\n" * 3


def test_job_that_makes_no_step_three_times_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = dry_run(capsys, "slurm")
    status = json.dumps({"state": "preempted", "step": 5}, indent=1)
    assert [attempt(script, folder, number, status).returncode for number in range(3)] == [0, 0, 1]
    assert (folder / "requeued").read_text() == "requeue 7\n" * 2


def test_job_of_a_failed_run_fails_with_its_code_and_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = dry_run(capsys, "slurm")
    for status in ("", json.dumps({"state": "failed", "step": 5}, indent=1)):
        done = attempt(script, folder, 0, status)
        assert done.returncode == 3
        assert "muonlm train: error" in done.stderr
    assert not (folder / "requeued").exists()


def test_own_templates_win(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "nccl.env").write_text("export NCCL_IB_HCA=mlx5_{{ 7 }}\n")
    script = dry_run(capsys, "slurm", "--templates", str(folder), "--interface", "ib0")
    assert "export NCCL_IB_HCA=mlx5_{{ 7 }}\n" in script  # settings are no template
    assert "export NCCL_SOCKET_IFNAME=ib0\nexport GLOO_SOCKET_IFNAME=ib0\n" in script
    assert "#SBATCH --requeue" in script


KUBERNETES = ["--to", "k8s", "--gpus-per-node", "1", "--container", "x", "--volume", "v"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "slurm"], "give either --gpus-per-node, or --ranks-per-node"),
        (["--to", "slurm", "--gpus-per-node", "1", "--ranks-per-node", "1"], "give either"),
        (["--to", "slurm", "--gpus-per-node", "8", "--nodes", "2"], "on 16 ranks: loop.batch_size 8 is not divisible"),
        (["--to", "slurm", "--gpus-per-node", "2", "loop.stepz=3"], "loop.stepz"),
        (["--to", "slurm", "--gpus-per-node", "2", "data.prepare="], "no prepared data in"),
        (["--to", "slurm", "--gpus-per-node", "2", "loop.device=cpu"], "leaves --gpus-per-node 2 idle"),
        (["--to", "slurm", "--ranks-per-node", "2", "loop.device=cuda"], "needs --gpus-per-node"),
        (["--to", "slurm", "--gpus-per-node", "2", "--time", "soon"], "--time soon is no time of Slurm"),
        (["--to", "slurm", "--gpus-per-node", "2", "--time", "2"], "no longer than the 120 s"),
        (["--to", "slurm", "--gpus-per-node", "2", "--sbatch", "qos=high"], "no option of sbatch"),
        (["--to", "slurm", "--gpus-per-node", "2", "--volume", "v"], "--volume is for --to k8s, not slurm"),
        (["--to", "slurm", "--gpus-per-node", "2", "--each", "seed=1", "--each", "seed=2"], "runs 0 and 1 would both"),
        (["--to", "slurm", "--gpus-per-node", "2", "--each", "seed='1"], '--each "seed=\'1": No closing quotation'),
        (["--to", "torchrun", "--gpus-per-node", "2", "--nodes", "2"], "needs --head HOST:PORT"),
        (["--to", "torchrun", "--gpus-per-node", "2", "--time", "5"], "--time is for --to slurm, not torchrun"),
        (["--to", "torchrun", "--gpus-per-node", "2", "--container", "x"], "start it inside the container"),
        (["--to", "torchrun", "--gpus-per-node", "1", "--elastic", "2"], "--elastic 2 is more than --nodes 1"),
        (
            ["--to", "torchrun", "--gpus-per-node", "1", "--nodes", "4", "--head", "h:1", "--elastic", "2"],
            "on 3 ranks: loop.batch_size 8 is not divisible",
        ),
        (["--to", "k8s", "--gpus-per-node", "2"], "needs --container IMAGE"),
        (["--to", "k8s", "--gpus-per-node", "2", "--container", "x"], "needs --volume CLAIM"),
        (["--to", "slurm", "--gpus-per-node", "2", "--env", "no"], "--env no is not NAME=VALUE"),
        (["--to", "slurm", "--gpus-per-node", "2", "--env", "é=1"], "--env é=1 is not NAME=VALUE"),
        (["--to", "slurm", "--gpus-per-node", "2", "--time", "9" * 17], "longer than the 68 years"),
        (["--to", "slurm", "--gpus-per-node", "2", "--time", "99999-00"], "longer than the 68 years"),
        (["--to", "torchrun", "--gpus-per-node", "2", "--python", "nope py"], "--python 'nope py' is no interpreter"),
        ([*KUBERNETES, "name=__"], "name = __ would be '' in Kubernetes, where a name begins with a letter"),
        ([*KUBERNETES, "name=1.2_x"], "name = 1.2_x would be '1-2-x' in Kubernetes"),
        (
            [*KUBERNETES, f"name={'a' * 62}"],
            "62 characters in Kubernetes, which beside the number of a pod has room for 61",
        ),
        ([*KUBERNETES, f"name={'a' * 61}", "--nodes", "16", "loop.batch_size=16"], "has room for 60"),
        ([*KUBERNETES, "--workdir", "runs"], "--workdir runs: in a pod it begins with /"),
        (["--to", "slurm", "--gpus-per-node", "2", "--gpu", "h101"], "h101"),
        (["--to", "slurm", "--ranks-per-node", "2", "--gpu", "h100-80gb"], "goes with --gpus-per-node"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_sent(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(folder))  # what is not refused starts nothing, and does not replace this process
    assert main(["submit", "smoke", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x85", "\u2028", "\udcff"], ids=ascii)
@pytest.mark.parametrize(
    "option",
    [
        "--partition=a{}b",
        "--sbatch=--qos=a{}b",
        "--env=A=x{}END_OF_NODE_SCRIPT",
        "--interface=a{}b",
        "--python=/a{}b",
        "--workdir=/a{}b",
        "--container=a{}b",
        "--each=name=a 'run_dir=a{}b'",
        "data.path=a{}b",
    ],
)
def test_values_cannot_add_lines_to_a_script(
    option: str, character: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = option.format(character)
    assert main(["submit", "smoke", "--to", "slurm", "--ranks-per-node", "2", "--dry-run", given]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "has a line break or another character that a script cannot carry" in printed.err


def test_line_breaks_between_the_words_of_an_array_task_are_spaces(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = dry_run(capsys, "slurm-array", "--each", "name=c\n  seed=2")
    assert "set -- smoke name=c seed=2\n" in script


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("--max-restarts", "-3", 0),
        ("--max-restarts", "few", 0),
        ("--ranks-per-node", "0", 1),
        ("--nodes", "1.5", 1),
        ("--grace", "9" * 17, 1),
    ],
)
def test_numbers_out_of_range_say_what_the_range_is(
    option: str, value: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["submit", "smoke", "--to", "slurm", option, value])
    assert stop.value.code == 2
    assert f"argument {option}: '{value}' is no whole number from {least} to 10^9" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["torchrun", "slurm-array"])
def test_a_printed_job_may_wait_for_its_data(target: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "--to", target.partition("-")[0], "smoke", *TARGETS[target], "--dry-run"]
    data = folder / "data" / "stdlib"
    for more, said in (
        ([], f"no prepared data in {data} yet: the job prepares them at its start (data.prepare=stdlib)\n"),
        (["data.prepare="], f"muonlm data prepare ... output={data} does"),
        (["--workdir", "/elsewhere"], "no prepared data in /elsewhere/data/stdlib yet"),
    ):
        assert main([*words, *more]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("#!/usr/bin/env bash\n")
        assert said in printed.err
        assert printed.err.count("no prepared data") == 1
    data.mkdir(parents=True)
    (data / "manifest.json").touch()
    assert main([*words, "data.prepare="]) == 0
    assert capsys.readouterr().err == ""


def test_data_that_only_a_container_sees_are_not_missed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("k8s", "slurm-pyxis"):
        assert (
            main(["submit", "--to", target.partition("-")[0], "smoke", *TARGETS[target], "--dry-run", "data.prepare="])
            == 0
        )
        assert capsys.readouterr().err == ""


def test_a_run_that_does_not_fit_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["submit", "smoke", "--to", "slurm", "--gpus-per-node", "1", "--gpu", "h100-80gb", "--dry-run"]
    assert main(arguments) == 0
    assert "fits on 1 x 1 h100-80gb" in capsys.readouterr().err
    large = ["model.hidden_size=16384", "model.num_heads=128", "model.num_layers=128", "model.intermediate_size=65536"]
    assert main([*arguments, *large]) == 2
    assert "more than the" in capsys.readouterr().err


def test_programs_that_are_missing_or_refuse_are_errors(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = folder.parent / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    command = ["submit", "smoke", "--to", "slurm", "--gpus-per-node", "1"]
    assert main(command) == 2
    assert "sbatch is not on this machine's PATH" in capsys.readouterr().err
    sbatch = tools / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    assert main(command) == 2
    assert "sbatch refused the job: sbatch: error: invalid partition" in capsys.readouterr().err
    sbatch.write_text(
        '#!/bin/sh\nread -r first\n[ "$first" = "#!/usr/bin/env bash" ] && echo "Submitted batch job 7"\n'
    )
    assert main(command) == 0
    assert capsys.readouterr().out == "Submitted batch job 7\n"
