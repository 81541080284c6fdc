"""The page: opens from disk alone, says the verdict first, shows every run, and hides no doubt."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from muonlm.config.errors import UserError
from muonlm.report.build import build_report
from muonlm.report.summary import summary

LOADING = {"src", "href", "xlink:href", "data", "action", "poster", "srcset", "background"}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects what a browser would load, identifiers, visible text, and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            value = value or ""
            self.ids += [value] if name == "id" else []
            self.targets += re.findall(r"url\(#([^)]*)\)", value)
            if name in LOADING:
                (self.targets if value.startswith("#") else self.loads).append(value.removeprefix("#"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parse(path: Path) -> tuple[Page, str]:
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def test_the_page_is_self_contained(reported: Path) -> None:
    page, text = parse(reported / "report.html")
    assert page.loads == []
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)), "figures must not share identifiers"
    assert set(page.targets) <= set(page.ids)


def test_every_figure_has_a_title_and_a_png(reported: Path) -> None:
    page, text = parse(reported / "report.html")
    svgs = re.findall(r"<svg[^>]*>\s*<title[^>]*>([^<]+)</title>", text)
    assert len(svgs) == page.tags.count("svg") == len(list((reported / "figures").glob("*.png"))) == 7
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in (reported / "figures").glob("*.png"))
    assert "var(--arm0)" in text
    assert not re.search(r"<svg[^>]* (width|height)=", text), "a fixed width does not fit a phone"


def test_the_verdict_stands_first_with_ratio_and_doubts(reported: Path) -> None:
    page, _ = parse(reported / "report.html")
    text = " ".join(" ".join(page.text).split())
    result = json.loads((reported / "compare.json").read_text())
    headline = result["verdict"]["arms"][0]["headline"]
    assert f"{result['ratios'][0]['mean']:.2f} times" in headline
    assert text.index("Not decided") < text.index(headline) < text.index("How the ratio was measured")
    assert "is the highest that was tried" in text[: text.index("How the ratio was measured")]
    assert "at the edge of the grid: extend it" in text, "in the table of optima"
    figure = text[text.index("Learning rate of the hidden matrices") : text.index("Ringed")]
    assert "edge of the grid" in figure, "in the figure, as text"


def test_every_run_is_listed_once_and_failures_with_their_reason(reported: Path) -> None:
    page, text = parse(reported / "report.html")
    result = json.loads((reported / "compare.json").read_text())
    runs = {trial["run_dir"] for trial in result["trials"]}
    assert f"{len(runs)} runs" in text
    assert text.count("tune and final") == 2
    assert "failed: non-finite gradient in layers.0.mlp.down_proj.weight" in " ".join(page.text)


def test_settings_that_differ_are_shown_and_common_ones_are_not(reported: Path) -> None:
    _, text = parse(reported / "report.html")
    table = text[text.index("All that differs between the arms") :]
    table = table[: table.index("</table>")]
    assert "optim.kind" in table
    assert "optim.momentum" in table
    assert "model.num_layers" not in table
    assert "loop.batch_size" not in table
    assert f"muonlm compare {reported / 'config.toml'}" in text


def test_text_from_files_is_escaped(comparison: Path) -> None:
    path = comparison / "compare.json"
    result = json.loads(path.read_text())
    result["name"] = "<script>alert(1)</script>"
    next(t for t in result["trials"] if t["error"])["error"] = "<img src=x>"
    path.write_text(json.dumps(result))
    page, _ = parse(build_report(comparison))
    assert not {"script", "img"} & set(page.tags)
    assert page.loads == []


def test_an_unfinished_comparison_has_a_report(comparison: Path) -> None:
    path = comparison / "compare.json"
    result = json.loads(path.read_text())
    for arm in result["arms"]:
        arm["best"] = None
    result |= {"state": "interrupted", "ratios": [], "trials": result["trials"][:2]}
    result["verdict"] = {"text": "The comparison is interrupted; there is no verdict yet.", "reproduced": None}
    path.write_text(json.dumps(result))
    page, _ = parse(build_report(comparison, comparison / "elsewhere" / "page.html"))
    assert "there is no verdict yet" in " ".join(page.text)
    assert "tuning unfinished" in " ".join(page.text)
    assert (comparison / "elsewhere" / "figures" / "tune_lr.png").exists()


def test_a_single_run_has_a_report(comparison: Path) -> None:
    run = next((comparison / "runs" / "muon").glob("final-*"))
    page, text = parse(build_report(run))
    assert page.loads == []
    status = json.loads((run / "status.json").read_text())
    assert f"Validation loss {status['final_loss']:.4f}" in text
    assert {p.stem for p in (run / "figures").glob("*.png")} == {"loss", "learning_rate", "grad_norms", "update_rms"}


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a comparison \(compare\.json\) nor a run"):
        build_report(tmp_path)


def test_terminal_summary_says_ratio_doubts_and_optima(comparison: Path) -> None:
    result = json.loads((comparison / "compare.json").read_text())
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary(result))
    text = " ".join(console.export_text().replace("│", " ").split())
    assert result["verdict"]["arms"][0]["headline"] in text
    assert "extend it upwards before believing the ratio" in text
    assert "adamw / muon (in-run, biased)" in text
    assert "lr at the edge of the grid" in text
