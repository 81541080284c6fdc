"""`muonlm submit --templates`: what is wrong in a template is said with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from muonlm.cli.main import main


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("torchrun.sh.j2", "a\n{{ name }\n", "/torchrun.sh.j2, line 2: TemplateSyntaxError: unexpected '}'"),
        ("torchrun.sh.j2", "{% if nodes %}\nb\n", "/torchrun.sh.j2, line 1: TemplateSyntaxError: Unexpected end"),
        ("torchrun.sh.j2", "a\nb\n{{ nodez }}\n", "/torchrun.sh.j2, line 3: UndefinedError: 'nodez' is undefined"),
        (
            "torchrun.sh.j2",
            "{{ name | nope }}",
            "/torchrun.sh.j2, line 1: TemplateAssertionError: No filter named 'nope'",
        ),
        ("torchrun.sh.j2", "\n{{ name + 1 }}", "/torchrun.sh.j2, line 2: TypeError: "),
        ("torchrun.sh.j2", "\n{% include 'no.j2' %}", "/torchrun.sh.j2, line 2: TemplateNotFound: 'no.j2' not found"),
        ("node.sh.j2", "{{ python | q }}\n{{ env.x.y }}", "/node.sh.j2, line 2: UndefinedError: "),
        ("nccl.env", b"\xff", ": UnicodeDecodeError: "),
    ],
)
@pytest.mark.parametrize("given", [".", "own", "absolute"])
def test_a_broken_template_is_named_with_its_line(
    name: str,
    text: str | bytes,
    place: str,
    given: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path if given == "." else tmp_path / "own"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ["submit", "smoke", "--to", "torchrun", "--ranks-per-node", "2", "--dry-run"]
    assert main([*words, "--templates", str(folder) if given == "absolute" else given]) == 2
    error = capsys.readouterr().err
    assert f"{folder}{place}" in error
