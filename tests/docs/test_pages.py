"""The index has every page; links lead to files and sections that are there; docs/checkpoints.md runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def anchors(page: Path) -> set[str]:
    """As forges make them of headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert linked == {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_sections(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, section = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not section or target.suffix != ".md" or section in anchors(target), f"{page.name}: {link}"


def test_the_page_of_checkpoints_runs(stdlib_data: Path, tmp_path: Path, run_python) -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stdlib").symlink_to(stdlib_data)
    steps = re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in steps] == ["bash", "bash", "python", "bash"]
    for kind, block in steps:
        programs = [["-c", block]] if kind == "python" else [arguments(line) for line in block.splitlines()]
        for program in programs:
            done = run_python(*program)
            assert done.returncode == 0, done.stderr
            if kind == "python":
                assert re.fullmatch(r"\(192, 64\) \d\d tensors\n", done.stdout)
    assert (tmp_path / "runs" / "moves" / "step_10.pt").stat().st_size > 1e6
    assert (tmp_path / "runs" / "moves" / "exported" / "model.safetensors").is_file()


def arguments(line: str) -> list[str]:
    first, *rest = shlex.split(line)
    return rest if first == "python" else ["-m", first, *rest]
