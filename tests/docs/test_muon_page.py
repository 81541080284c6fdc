"""docs/muon.md is true: its programs print what it shows, its formulas are Muon's, its commands and figures exist."""

from __future__ import annotations

import contextlib
import io
import math
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from muonlm.cli.main import main
from muonlm.config.optim import NewtonSchulzConfig
from muonlm.optim.muon import Muon
from muonlm.optim.scaling import convert_learning_rate
from muonlm_kernels import coefficients, matmul_flops

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "muon.md").read_text()
PROSE = " ".join(PAGE.split())
# Each program with the output that is shown right below it, if any.
PROGRAMS = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", PAGE, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"`(muonlm [^`]+)`", PROSE)))


@cache
def run_page() -> tuple[dict[str, Any], list[str]]:
    """The names that all programs leave, run in order as one, and what each printed."""
    names: dict[str, Any] = {}
    printed = []
    with contextlib.chdir(ROOT), torch.random.fork_rng():
        for code, _ in PROGRAMS:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, "muon.md", "exec"), names)
            printed.append(out.getvalue())
    return names, printed


def printed_by(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """Output of `muonlm ...`, which must end well."""
    with contextlib.suppress(SystemExit):  # argparse leaves so after --help
        assert main(shlex.split(command)[1:]) == 0
    return capsys.readouterr().out


def test_programs_print_what_the_page_shows() -> None:
    assert len(PROGRAMS) >= 4
    assert run_page()[1] == [shown for _, shown in PROGRAMS]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_update_is_that_of_muon(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(shape, generator=generator) for _ in range(4))
    weight, momentum = start, torch.zeros(shape)
    param = torch.nn.Parameter(start.clone())
    optimizer = Muon([param], lr=0.02, dtype=torch.float32)
    for grad in grads:
        weight, momentum = run_page()[0]["muon_step"](weight, grad, momentum, 0.02)
        param.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(param.detach(), weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], momentum)


def test_what_is_said_of_the_singular_values() -> None:
    names, _ = run_page()
    sign = torch.linalg.svdvals(names["G"].sign())
    assert f"still spreads {sign[0] / sign[-1]:.0f}-fold" in PROSE
    first_half = torch.linalg.svdvals(names["O"])[:32]
    assert f"first half of the directions is within {(first_half - 1).abs().max():.0%}" in PROSE.replace(" %", "%")
    lift = math.prod(a for a, _, _ in coefficients("polar_express", 5))
    assert f"lift a small singular value {lift:.0f}-fold at most" in PROSE, lift
    assert f"which ends at {torch.linalg.svdvals(names['O'])[-1]:.2f}" in PROSE


def test_learning_rates_are_those_of_convert_learning_rate() -> None:
    assert convert_learning_rate(8e-4, "adamw", "rms_adamw", (2048, 5632)) == pytest.approx(8e-4)
    square, wide = (convert_learning_rate(8e-4, "adamw", "spectral", (2048, cols)) for cols in (2048, 5632))
    assert f"`spectral` needs {square:.2g} for a matrix of 2048 x 2048 and {wide:.2g} for one of (2048, 5632)" in PROSE


@pytest.mark.parametrize(("m", "n", "tokens"), [(2048, 5632, 2**20), (768, 768, 2**15)])
def test_share_of_newton_schulz_is_the_formula(m: int, n: int, tokens: int) -> None:
    assert "5 (4 m + 2 m^2 / n) / (6 B)" in PROSE
    share = matmul_flops(m, n) / (6 * m * n * tokens)
    assert share == pytest.approx(5 * (4 * m + 2 * m**2 / n) / (6 * tokens))


def test_figures_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = (command for command in COMMANDS if command.startswith("muonlm plan"))
    (said,) = re.findall(r"says that Newton-Schulz adds (.*?)\. Small batches", PROSE)
    found = {}
    for config in ("gpt-1b", "gpt-1b-adamw"):
        printed = printed_by(capsys, command.replace("gpt-1b", config))
        lines = {line.split("  ")[0]: re.split("  +", line) for line in printed.splitlines()}
        sent = re.search(r"^Sent by.*?^together +(\S+ GB)", printed, re.DOTALL | re.MULTILINE)
        assert sent
        found[config] = lines["optimizer state"][1], sent.group(1)
        if config == "gpt-1b":
            (added,) = re.findall(r"Newton-Schulz \(\+(.*?)%\)", printed)
    (state, traffic), (adamw_state, adamw_traffic) = found["gpt-1b"], found["gpt-1b-adamw"]
    assert said == (
        f"{added} % to its FLOPs, that a rank's optimizer state takes {state}, and that it sends {traffic} a step; for "
        f"`gpt-1b-adamw` it says {adamw_state} and {adamw_traffic}"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With `--help`: in full they take minutes, or need a finished run, and have tests of their own."""
    words = shlex.split(command)
    assert printed_by(capsys, f"{command} --help").startswith("usage: "), command
    if words[1] == "train":
        assert (ROOT / "configs" / "train" / f"{words[2]}.toml").is_file()


@pytest.mark.parametrize(
    ("page", "there", "here"),
    [
        ("training.md", r"^\| AdamW, `compile` \| 453,000 ", "453,000 tokens/s with AdamW and "),
        ("training.md", r"^\| Muon, `compile` \| 381,000 ", " and 381,000 with Muon"),
        (
            "log.md",
            r"as shipped\*\* \| \*\*1\.16 \(1\.13 to 1\.19\)",
            "1.16 times the tokens of Muon (95 % interval 1.13 to 1.19",
        ),
        ("log.md", r" \| 1\.03 \(.*\); again: 1\.08 \(", "1.03 to 1.08 times the time"),
        ("log.md", r"^\| 2e-3 .* \*\*3\.630\*\* ", "AdamW's best was 2e-3"),
        ("log.md", r" \| 6e-3 .* \*\*3\.547\*\* ", "and Muon's 6e-3"),
    ],
)
def test_quoted_measurements_are_those_of_their_pages(page: str, there: str, here: str) -> None:
    assert re.search(there, (DOCS / page).read_text(), re.MULTILINE)
    assert here in PROSE


def test_links_to_sections_lead_to_sections() -> None:
    links = re.findall(r"\]\((\w[\w-]*\.md)#([\w-]+)\)", PAGE)
    assert len(links) >= 6
    for page, section in links:
        titles = re.findall(r"^#+ (.+)$", (DOCS / page).read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert section in anchors, f"{page} has no section {section}"


def test_newton_schulz_page_names_the_sets_that_a_configuration_takes() -> None:
    (said,) = re.findall(r"configuration of `muonlm train` takes (.*?) \(", (DOCS / "newton-schulz.md").read_text())
    known = get_args(NewtonSchulzConfig.model_fields["coefficients"].annotation)
    assert sorted(re.findall(r"`(\w+)`", said)) == sorted(known)
