"""What a page is made of (verdicts, key numbers, sections of figures and tables), and its rendering as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure as MatplotlibFigure

from muonlm.report.svg import inline_svg

Tone = Literal["", "plain", "good", "open", "bad"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """A table; `numeric` are the columns aligned to the right, `folded` hides it behind its caption."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: Sequence[int] = ()
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure with its heading; `alternative` tells in words what is seen."""

    name: str
    title: str
    caption: str
    alternative: str
    figure: MatplotlibFigure

    @property
    def svg(self) -> Markup:
        """The figure as inline SVG; matplotlib has escaped the text in it."""
        return Markup(inline_svg(self.figure, self.name, self.alternative))


@dataclass(frozen=True)
class Block:
    """Preformatted text under a heading."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Tile:
    """A key number."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Verdict:
    """The answer, before everything else."""

    tone: Tone
    state: str
    headline: str
    points: Sequence[str] = ()
    scope: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with what belongs under it; `is_paired` puts tables beside the figures where there is room."""

    title: str
    lead: str = ""
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    blocks: Sequence[Block] = ()
    is_paired: bool = False


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    verdicts: Sequence[Verdict]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    footer: str
    pictures: list[Picture] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", [p for section in self.sections for p in section.figures])


def cells(*values: str | Cell) -> list[Cell]:
    """A row of a table."""
    return [value if isinstance(value, Cell) else Cell(value) for value in values]


def write(page: Page, out: Path, figures: Path) -> None:
    """Write the HTML to `out` and every figure as PNG into `figures`; figures of an earlier report are removed."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("muonlm.report").joinpath("page.html.j2").read_text(encoding="utf-8"))
    text = template.render({name: getattr(page, name) for name in ("title", "verdicts", "tiles", "sections", "footer")})
    figures.mkdir(parents=True, exist_ok=True)
    for old in figures.glob("*.png"):
        old.unlink()
    for picture in page.pictures:
        picture.figure.savefig(figures / f"{picture.name}.png", dpi=160, facecolor="white")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(re.sub(r"\n\s*\n+", "\n", text), encoding="utf-8")
