"""The command line: what it imports, what it prints, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import muonlm
from muonlm.cli.main import build_parser, main
from muonlm.config.data import PrepareConfig
from muonlm.config.load import load_compare, load_prepare, load_train
from muonlm.config.schema import TrainConfig

ROOT = Path(muonlm.__file__).resolve().parent.parent
COMMANDS = ("train", "plan", "submit", "data", "compare", "report", "study", "bench", "export", "import", "doctor")
NESTED = [["data", "prepare"], ["data", "describe"], ["data", "verify"], ["study", "spectra"]]


@pytest.fixture
def fake_loop(put_module: Callable[..., None]) -> list[tuple[TrainConfig, bool]]:
    """`muonlm.train.loop` that only notes its calls."""
    calls: list[tuple[TrainConfig, bool]] = []

    def train(config: TrainConfig, *, fresh: bool = False, stop: object = None) -> SimpleNamespace:
        calls.append((config, fresh))
        state = "preempted" if config.name == "stopped" else "finished"
        loss = None if config.name == "stopped" else 2.5
        return SimpleNamespace(state=state, step=7, tokens=3584, final_loss=loss, seconds=1.0)

    put_module("muonlm.train.loop", train=train)
    return calls


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['muonlm', '--help']\n"
        "from muonlm.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print(sorted(sys.modules), file=sys.stderr)\n"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        times.append(time.perf_counter() - start)
    for module in ("torch", "numpy", "datasets", "transformers", "pydantic", "rich"):
        assert f"'{module}'" not in done.stderr
    assert all(f"\n    {command} " in done.stdout for command in COMMANDS)
    assert min(times) < 0.5


def test_help_of_train_lists_the_keys_without_torch() -> None:
    code = (
        "import sys\nfrom muonlm.cli.main import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "False\n"
    assert done.stdout.startswith("usage: muonlm train [-h] [--dry-run] [--fresh] CONFIG [KEY=VALUE ...]\n")
    assert "  optim.newton_schulz.steps =" in done.stdout


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), *NESTED], ids=" ".join)
def test_every_help_fits_100_columns(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, *words)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert text.startswith(f"usage: {' '.join(['muonlm', *words])}")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train"], "optim.newton_schulz.steps ="),
        (["compare"], "arms.aux_lr (required)"),
        (["data", "prepare"], "tokenizer.vocab_size ="),
    ],
    ids=["train", "compare", "data"],
)
def test_help_ends_with_the_keys_of_its_config(words: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"\n  {key} " in help_of(capsys, *words)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"muonlm {muonlm.__version__}\n"


def test_every_command_says_what_runs_it() -> None:
    """A command without `run` would fail only when it is used."""
    examples = {
        "train": ["x"],
        "plan": ["x"],
        "submit": ["--to", "slurm", "x"],
        "export": ["x", "y"],
        "import": ["x"],
        "data": ["describe", "x"],
        "compare": ["x"],
        "report": ["x"],
        "study": ["spectra", "x"],
        "bench": ["train"],
        "doctor": [],
    }
    for command in COMMANDS:
        assert callable(build_parser().parse_args([command, *examples[command]]).run)


@pytest.mark.parametrize(
    ("command", "load"),
    [(["train", "smoke"], load_train), (["data", "prepare", "stdlib"], load_prepare)],
    ids=["train", "data"],
)
def test_dry_run_prints_the_config_and_stops(
    command: list[str], load: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*command, "seed=11", "--dry-run"]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert load(str(printed)) == load(command[-1], ["seed=11"])


def test_dry_run_of_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        'name = "c"\nbase = "smoke"\nreference = "a"\nbudgets_tokens = [20480]\nseeds = [0]\n'
        '[[arms]]\nname = "a"\nlr = [0.1]\naux_lr = [0.1]\nset = {"optim.kind" = "adamw"}\n'
        '[[arms]]\nname = "b"\nlr = [0.1]\naux_lr = [0.1]\n'
    )
    assert main(["compare", str(config), "jobs=3", "--dry-run"]) == 0
    config.write_text(capsys.readouterr().out)
    assert load_compare(str(config)).jobs == 3


def test_overrides_may_stand_on_both_sides_of_an_option(fake_loop: list[tuple[TrainConfig, bool]]) -> None:
    assert main(["train", "smoke", "seed=1", "data.prepare=", "--fresh", "optim.kind=adamw", "seed=2"]) == 0
    ((config, fresh),) = fake_loop
    assert (config.seed, config.optim.kind, config.data.prepare, fresh) == (2, "adamw", None, True)


def test_train_says_how_it_ended(fake_loop: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "smoke", "data.prepare="]) == 0
    assert capsys.readouterr().out == (
        "finished at step 7, 3,584 tokens, validation loss 2.5000: runs/smoke\nsee it with: muonlm report runs/smoke\n"
    )
    assert main(["train", "smoke", "data.prepare=", "name=stopped"]) == 0
    assert capsys.readouterr().out == (
        "preempted at step 7, 3,584 tokens: runs/stopped\nrepeat the same command to go on\n"
    )


def test_user_errors_are_printed_once_and_exit_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "smoke", "optim.lrr=1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "muonlm train: error\nsmoke: 1 problem\n  command line: optim.lrr = 1\n"
        "      unknown key; did you mean optim.lr?\n"
    )
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "smoke", "optim.lrr=1"]) == 2
    assert capsys.readouterr().err == (
        "muonlm train: error on rank 3: smoke: 1 problem "
        "command line: optim.lrr = 1 unknown key; did you mean optim.lr?\n"
    )


def test_faults_of_the_program_keep_their_traceback(put_module: Callable[..., None]) -> None:
    def train(config: TrainConfig, *, fresh: bool, stop: object) -> None:
        raise ValueError("a bug")

    put_module("muonlm.train.loop", train=train)
    with pytest.raises(ValueError, match="a bug"):
        main(["train", "smoke", "data.prepare="])


def test_interrupt(put_module: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(config: PrepareConfig) -> None:
        raise KeyboardInterrupt

    put_module("muonlm.data.prepare", prepare=prepare)
    assert main(["data", "prepare", "stdlib"]) == 130
    assert "muonlm data: interrupted; repeat the same command to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "smoke", "--lr", "0.1"], "train does not know --lr; keys of the config are given without dashes"),
        (["train", "smoke", "--dry", "seed=1"], "train does not know --dry;"),
        (["report", "runs/x", "y"], "report does not know y (see muonlm report --help)"),
        (["train"], "the following arguments are required: CONFIG"),
        (["trian", "smoke"], "invalid choice: 'trian'"),
    ],
    ids=str,
)
def test_wrong_arguments(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_configs_of_the_readme_command_exist() -> None:
    smoke = load_train("smoke")
    assert (smoke.data.path, smoke.data.prepare) == ("data/stdlib", "stdlib")
    assert load_prepare("stdlib").output == smoke.data.path


def test_python_m_muonlm_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "muonlm", "train", "nothing"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith('muonlm train: error\nno train config is called "nothing"\n')
    assert "Traceback" not in done.stderr


def test_user_error_in_any_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["study", "spectra", str(tmp_path / "a"), "b"]) == 2
    assert capsys.readouterr().err.startswith(f"muonlm study: error\n{tmp_path / 'a'} is no run directory")


def test_a_pipe_that_has_gone_ends_a_command_with_141_and_no_traceback() -> None:
    command = [sys.executable, "-m", "muonlm", "plan", "gpt-10m", "--vocab-size", "1024", "--memory-gb", "80"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize("words", [["data", "describe"], ["plan", "gpt-10m", "--vocab-size", "1024"]])
def test_standard_output_may_be_closed_before_the_start(words: list[str], stdlib_data: Path) -> None:
    command = [sys.executable, "-m", "muonlm", *words, *([str(stdlib_data)] if "describe" in words else [])]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
