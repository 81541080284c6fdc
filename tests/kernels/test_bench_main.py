"""The command line of `muonlm_kernels.bench`: which module a command runs, and what it says where it cannot."""

from __future__ import annotations

import importlib
import sys

import pytest

from muonlm_kernels.bench import compare, compiled
from muonlm_kernels.bench.__main__ import COMMANDS, main


@pytest.fixture
def compared(monkeypatch):
    """Whether `compare` ran with --quick, for each time that it ran."""
    calls = []
    monkeypatch.setattr(compare, "run", lambda args: calls.append(args.quick) or 7)
    return calls


@pytest.mark.parametrize("argv", [["compare"], []])
def test_compare_is_the_default(argv, compared):
    assert main(argv) == 7
    assert main([*argv, "--quick"]) == 7
    assert compared == [False, True]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_under_the_name_it_was_called_by(name, capsys):
    module = importlib.import_module(f"muonlm_kernels.bench.{COMMANDS[name][0]}")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"], prog="some program")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: some program {name} " in text
    assert module.__doc__.splitlines()[0] in text


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"], prog="some program")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: some program [COMMAND] [OPTIONS]" in text
    assert all(f"  {name} " in text for name in COMMANDS)


def test_an_unknown_command_ends_with_2_and_names_those_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compar"])
    assert ended.value.code == 2
    assert "associative-memory" in capsys.readouterr().err


def test_compiled_says_how_to_get_triton(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["compiled"]) == 2
    assert "pip install triton" in capsys.readouterr().err


def test_compiled_refuses_an_interpreting_process(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["compiled"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET" not in (compiled.why_not() or "")


@pytest.mark.parametrize("name", ["compare", "errors", "associative-memory"])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--json", str(tmp_path / "missing" / "x.json")])
    assert ended.value.code == 2
    assert "x.json" in capsys.readouterr().err
