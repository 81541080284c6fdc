"""The command line: what it imports, what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import muonlm
from muonlm.cli.main import build_parser, main
from muonlm.config.data import PrepareConfig
from muonlm.config.errors import UserError
from muonlm.config.load import load_compare, load_prepare, load_train
from muonlm.config.schema import TrainConfig

ROOT = Path(muonlm.__file__).resolve().parent.parent
COMMANDS = ("train", "plan", "data", "compare", "report", "study", "bench", "doctor")
NESTED = [["data", "prepare"], ["data", "describe"], ["data", "verify"], ["study", "spectra"]]


@pytest.fixture
def fake_loop(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, bool]]:
    """`muonlm.train.loop` that only notes its calls."""
    calls: list[tuple[TrainConfig, bool]] = []

    def train(config: TrainConfig, *, fresh: bool = False, stop: object = None) -> SimpleNamespace:
        calls.append((config, fresh))
        state = "preempted" if config.name == "stopped" else "finished"
        loss = None if config.name == "stopped" else 2.5
        return SimpleNamespace(state=state, step=7, tokens=3584, final_loss=loss, seconds=1.0)

    put_module(monkeypatch, "muonlm.train.loop", train=train)
    return calls


def put_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Callable[..., Any]) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


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
    assert capsys.readouterr().err == "muonlm train: error on rank 3: smoke: 1 problem\n"


def test_faults_of_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: TrainConfig, *, fresh: bool, stop: object) -> None:
        raise ValueError("a bug")

    put_module(monkeypatch, "muonlm.train.loop", train=train)
    with pytest.raises(ValueError, match="a bug"):
        main(["train", "smoke", "data.prepare="])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(config: PrepareConfig) -> None:
        raise KeyboardInterrupt

    put_module(monkeypatch, "muonlm.data.prepare", prepare=prepare)
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


def test_bench_gets_all_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    put_module(monkeypatch, "muonlm.bench.train", main=seen.append)
    assert main(["bench", "train", "smoke", "--steps", "3", "--help"]) == 0
    assert seen == [["smoke", "--steps", "3", "--help"]]


def test_bench_newton_schulz_gets_all_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], str]] = []

    def kernels_main(argv: list[str], prog: str) -> int:
        seen.append((argv, prog))
        return 2

    put_module(monkeypatch, "muonlm_kernels.bench.__main__", main=kernels_main)
    assert main(["bench", "newton-schulz", "compare", "--shapes", "8x8", "2x4x4", "--quick", "--help"]) == 2
    words = ["compare", "--shapes", "8x8", "2x4x4", "--quick", "--help"]
    assert seen == [(words, "muonlm bench newton-schulz")]


def test_help_of_bench_imports_no_torch() -> None:
    code = (
        "import sys\nfrom muonlm.cli.main import main\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "False\n"
    assert "newton-schulz" in done.stdout


def test_data_commands_on_real_data(stdlib_data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "describe", str(stdlib_data)]) == 0
    assert "validation" in capsys.readouterr().out
    assert main(["data", "verify", str(stdlib_data)]) == 0
    assert "all as they were written" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / "none")]) == 2
    assert main(["data", "describe", str(tmp_path)]) == 2


def test_data_prepare_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.txt").write_text("to be or not to be\n" * 200)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"line {number} of a text that goes on and on\n" * 20)
    words = [f"source.files=['{tmp_path}/*.txt']", f"output={tmp_path / 'out'}", "tokenizer.vocab_size=300"]
    assert main(["data", "prepare", "source.kind=text", *words, "validation_fraction=0.3"]) == 0
    assert (tmp_path / "out" / "manifest.json").is_file()
    capsys.readouterr()
    assert main(["data", "prepare", "source.kind=text"]) == 2
    assert "output is missing" in capsys.readouterr().err


def test_compare_passes_config_and_prints_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f'name = "c"\nbase = "smoke"\noutput_dir = "{tmp_path / "out"}"\nreference = "a"\nbudgets_tokens = [20480]\n'
        'seeds = [0]\n[[arms]]\nname = "a"\nlr = [0.1]\naux_lr = [0.1]\n'
        '[[arms]]\nname = "b"\nlr = [0.1]\naux_lr = [0.1]\n'
    )
    state = {"state": "finished", "verdict": {"text": "A beats B."}}
    put_module(monkeypatch, "muonlm.compare.run", compare=lambda config: state)
    put_module(monkeypatch, "muonlm.report.build", build_report=lambda directory: Path(directory) / "report.html")
    put_module(monkeypatch, "muonlm.report.summary", summary=lambda comparison: comparison["verdict"]["text"])
    assert main(["compare", str(config)]) == 0
    assert capsys.readouterr().out == f"A beats B.\nreport: {tmp_path / 'out' / 'report.html'}\n"
    state["state"] = "interrupted"
    assert main(["compare", str(config)]) == 130


def test_report_opens_the_page_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    put_module(monkeypatch, "muonlm.report.build", build_report=lambda d, out: Path(out or f"{d}/report.html"))
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    assert opened == []
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html"), "--open"]) == 0
    assert opened == [(tmp_path / "x.html").as_uri()]
    assert main(["report", str(tmp_path / "none")]) == 2


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


def test_extras_of_doctor_are_those_of_the_package() -> None:
    from muonlm.cli.checks import FEATURES, REQUIRED

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {requirement.split(">")[0].split("=")[0].strip() for requirement in requirements}

    assert names(project["dependencies"]) == set(REQUIRED)
    extras = {extra: names(needs) for extra, needs in project["optional-dependencies"].items() if extra != "dev"}
    assert {extra: set(packages) for extra, (_, packages) in FEATURES.items()} == extras


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["packages"]["torch"]
    assert found["matmul_tflops"]["float32"] > 0
    assert "gloo" in found["distributed"]
    assert found["disk"]["free_bytes"] > 0
    assert main(["doctor"]) == 0
    assert "Try: muonlm train smoke" in capsys.readouterr().out


def test_doctor_names_what_is_broken_and_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from muonlm.cli import checks

    monkeypatch.setitem(sys.modules, "tokenizers", None)  # `import tokenizers` fails as if it were not there
    installed = checks.version
    monkeypatch.setattr(checks, "version", lambda name: None if name == "wandb" else installed(name))
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (problem,) = found["problems"]
    assert problem == "tokenizers is not installed; try: pip install tokenizers"
    (tracking,) = (feature for feature in found["features"] if "TensorBoard" in feature["feature"])
    assert (tracking["is_ready"], tracking["install"]) == (False, "pip install 'muonlm[tracking]'")
    assert main(["doctor"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "problem: tokenizers is not installed; try: pip install tokenizers" in printed
    assert "Everything" not in printed


def test_user_error_in_any_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["study", "spectra", str(tmp_path / "a"), "b"]) == 2
    assert capsys.readouterr().err.startswith(f"muonlm study: error\n{tmp_path / 'a'} is no run directory")


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smoke", "loop.batch_size=12", "--world-size", "3", "--vocab-size", "700"]) == 0
    printed = capsys.readouterr().out
    assert "3 ranks" in printed
    assert re.search(r"parameters, embedding +44\.8 k", printed)
    assert main(["plan", "smoke", "--world-size", "3"]) == 2
    assert "loop.batch_size 8 is not divisible by 3 ranks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "smoke", "--world-size", "0"])
    assert "--world-size: invalid" in capsys.readouterr().err


def test_plan_finds_the_vocabulary(stdlib_data: Path, tmp_path: Path) -> None:
    from muonlm.cli.plan import find_vocab_size

    missing = f"data.path={tmp_path / 'none'}"
    assert find_vocab_size(load_train("smoke", [missing]), 77) == 77
    assert find_vocab_size(load_train("smoke", [missing, "model.vocab_size=99"]), None) == 99
    assert find_vocab_size(load_train("smoke", [f"data.path={stdlib_data}"]), None) == 512
    assert find_vocab_size(load_train("smoke", [missing]), None) == load_prepare("stdlib").tokenizer.vocab_size
    with pytest.raises(UserError, match="give --vocab-size N"):
        find_vocab_size(load_train("smoke", [missing, "data.prepare="]), None)


def test_study_of_a_comparison_takes_its_final_runs_at_the_largest_budget(tmp_path: Path) -> None:
    from muonlm.cli.study import runs_in

    def trial(phase: str, budget: int, state: str, name: str) -> dict[str, Any]:
        return {"phase": phase, "budget_tokens": budget, "state": state, "run_dir": f"runs/{name}"}

    trials = [trial("tune", 8, "finished", "a"), trial("final", 8, "finished", "b"), trial("final", 16, "failed", "c")]
    (tmp_path / "compare.json").write_text(json.dumps({"trials": trials}))
    assert runs_in(tmp_path) == [tmp_path / "runs/b"]
    trials += [trial("final", 16, "finished", "d"), trial("final", 16, "finished", "e")]
    (tmp_path / "compare.json").write_text(json.dumps({"trials": trials}))
    assert runs_in(tmp_path) == [tmp_path / "runs/d", tmp_path / "runs/e"]
    assert runs_in(tmp_path / "runs/d") == [tmp_path / "runs/d"]
    (tmp_path / "compare.json").write_text(json.dumps({"trials": trials[:1]}))
    with pytest.raises(UserError, match="no final run is finished yet"):
        runs_in(tmp_path)
