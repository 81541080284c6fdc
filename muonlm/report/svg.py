"""From a matplotlib figure to an inline SVG that follows the page: its fonts, its light or dark colours, its width."""

from __future__ import annotations

import html
import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1f24", "#5b6672", "#d9dee4"
ARM_COLORS = ("#c44e00", "#0069b4", "#008060", "#9c3f8c", "#8a6a00")
"""Vermilion, blue, green, purple, ochre after Okabe and Ito, dark enough for text on white; the reference is first."""

_PAGE_COLORS = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)"} | {
    color: f"var(--arm{index})" for index, color in enumerate(ARM_COLORS)
}


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element that needs nothing else, with `title` for those who cannot see it.

    Colours become variables of the page, text stays text, identifiers get `name` as prefix so that several figures can
    stand on one page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "muonlm"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", r"font: \1\2px var(--font)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    for color, variable in _PAGE_COLORS.items():
        text = text.replace(color, variable)
    heading = f'<title id="{name}-title">{html.escape(title)}</title>'
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None, "matplotlib writes an svg element"
    tag = re.sub(r'\s(width|height)="[^"]*"', "", opening[0])
    return tag[:-1] + f' role="img" aria-labelledby="{name}-title">' + heading + text[opening.end() :]
