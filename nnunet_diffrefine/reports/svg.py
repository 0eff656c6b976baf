"""Drawings: files for papers, and SVG that lives inside the page and follows its colours."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

INK = "#1b2127"
QUIET = "#7d8790"
BETTER = "#0072b2"  # Okabe and Ito's blue and vermilion: told apart with any colour vision
WORSE = "#d55e00"
PAGE_COLOURS = {INK: "currentColor", BETTER: "var(--better)", WORSE: "var(--worse)"}
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": QUIET,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
DPI = 200


@dataclass(frozen=True)
class Drawing:
    """Something that draws itself on an axis.

    Args:
        title: above it.
        draw: called with the axis.
        size: width and height in inches.
        bare: without axes, filling its whole area: a picture.
        links: a sentence for each link target in the drawing, shown when the pointer rests on it.
    """

    title: str
    draw: Callable[[Axes], None]
    size: tuple[float, float]
    bare: bool = False
    links: Mapping[str, str] = field(default_factory=dict)


def save_row(drawings: Sequence[Drawing], file: Path, columns: int = 4) -> None:
    """Write the drawings side by side as ``file`` with endings .svg and .png, on white, with their titles."""
    n = min(columns, len(drawings))
    rows = -(-len(drawings) // n)
    width, height = (max(drawing.size[i] for drawing in drawings) for i in (0, 1))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": file.name}):
        figure = Figure(figsize=(width * n, (height + 0.25) * rows), layout="constrained")
        axes = figure.subplots(rows, n, squeeze=False).ravel()
        for axis, drawing in zip(axes, drawings, strict=False):
            drawing.draw(axis)
            axis.set_title(drawing.title, parse_math=False)
        for axis in axes[len(drawings) :]:
            axis.axis("off")
        _plain_text(figure)
        for ending, metadata in ((".svg", NO_METADATA), (".png", {"Software": None})):
            temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            try:
                figure.savefig(temporary, format=ending[1:], dpi=DPI, facecolor="white", metadata=metadata)
                os.replace(temporary, file.with_name(file.name + ending))
            finally:
                temporary.unlink(missing_ok=True)


def inline(drawing: Drawing, name: str) -> str:
    """The drawing as an ``<svg>`` element.

    It has no size, scales with the page, takes its text and colours from it, and names nothing outside itself. Its
    title is its accessible name, not drawn.

    Args:
        drawing: to draw.
        name: unique in the page, letters, digits and hyphens: prefix of all ids.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=drawing.size, layout=None if drawing.bare else "constrained")
        drawing.draw(figure.add_axes((0, 0, 1, 1)) if drawing.bare else figure.add_subplot())
        _plain_text(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    return _for_page(text.getvalue(), drawing, name)


def _plain_text(figure: Figure) -> None:
    """Names of classes and systems may hold dollar signs; no text of ours is mathematics."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def _for_page(svg: str, drawing: Drawing, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.S)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view, "matplotlib writes a viewBox"
    role = "group" if drawing.links else "img"
    head = f'<svg class="drawing" role="{role}" aria-label="{html.escape(drawing.title)}" {view[0]}>'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r'( id="|url\(#|xlink:href="#)(?!row-)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(font: [^;\"]*?\d(?:px)?) '[^;\"]*", r"\1 var(--sans)", svg)
    for colour, page in PAGE_COLOURS.items():
        svg = svg.replace(colour, page)

    def link(found: re.Match[str]) -> str:
        sentence = html.escape(drawing.links[found[1]])
        return f'<a href="#{found[1]}" tabindex="-1"><title>{sentence}</title>'

    # matplotlib's links open a new tab
    return re.sub(r'<a xlink:href="#(row-\d+)"[^>]*>', link, svg)
