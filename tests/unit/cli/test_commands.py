"""The commands beside train: what each passes on, prints and returns."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import muonlm
from muonlm.cli.main import main
from muonlm.config.errors import UserError
from muonlm.config.load import load_prepare, load_train

ROOT = Path(muonlm.__file__).resolve().parent.parent


def test_bench_gets_all_its_arguments(put_module: Callable[..., None]) -> None:
    seen: list[list[str]] = []
    put_module("muonlm.bench.train", main=seen.append)
    assert main(["bench", "train", "smoke", "--steps", "3", "--help"]) == 0
    assert seen == [["smoke", "--steps", "3", "--help"]]


def test_bench_newton_schulz_gets_all_its_arguments(put_module: Callable[..., None]) -> None:
    seen: list[tuple[list[str], str]] = []

    def kernels_main(argv: list[str], prog: str) -> int:
        seen.append((argv, prog))
        return 2

    put_module("muonlm_kernels.bench.__main__", main=kernels_main)
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
    put_module: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f'name = "c"\nbase = "smoke"\noutput_dir = "{tmp_path / "out"}"\nreference = "a"\nbudgets_tokens = [20480]\n'
        'seeds = [0]\n[[arms]]\nname = "a"\nlr = [0.1]\naux_lr = [0.1]\n'
        '[[arms]]\nname = "b"\nlr = [0.1]\naux_lr = [0.1]\n'
    )
    state = {"state": "finished", "verdict": {"text": "A beats B."}}
    put_module("muonlm.compare.run", compare=lambda config: state)
    put_module("muonlm.report.build", build_report=lambda directory: Path(directory) / "report.html")
    put_module("muonlm.report.summary", summary=lambda comparison: comparison["verdict"]["text"])
    assert main(["compare", str(config)]) == 0
    assert capsys.readouterr().out == f"A beats B.\nreport: {tmp_path / 'out' / 'report.html'}\n"
    state["state"] = "interrupted"
    assert main(["compare", str(config)]) == 130


def test_report_opens_the_page_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, put_module: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    put_module("muonlm.report.build", build_report=lambda d, out: Path(out or f"{d}/report.html"))
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    assert opened == []
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html"), "--open"]) == 0
    assert opened == [(tmp_path / "x.html").as_uri()]
    assert main(["report", str(tmp_path / "none")]) == 2


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


def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no data are prepared
    assert main(["plan", "smoke", "loop.batch_size=12", "--world-size", "3", "--vocab-size", "700"]) == 0
    printed = capsys.readouterr().out
    assert "3 x cpu: 3 replicate, DDP" in printed
    assert "44.8 k" in printed
    assert main(["plan", "smoke", "--world-size", "3"]) == 2
    assert "loop.batch_size 8 is not divisible by 3 ranks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "smoke", "--world-size", "0"])
    assert "--world-size: '0' is no whole number" in capsys.readouterr().err


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
