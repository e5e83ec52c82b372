"""What the HTML reports have in common: skeleton and style of a page that is one file, and matplotlib's pictures in it.

Pictures are drawn with sentinel colours, which are replaced by CSS variables: one picture serves the light and the dark
page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parent
INK, MUTED, GRID = "#010101", "#020202", "#030303"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"}
"""Sentinel colours of text, secondary text and lines, and the variables of ``base.css`` that they stand for."""


def environment(folder: Path) -> jinja2.Environment:
    """The templates of ``folder``, which may extend ``base.html``; whatever they are given is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def style(folder: Path) -> Markup:
    """The style sheet of a page: ``base.css``, then ``folder/style.css``, whose rules win."""
    sheets = (FOLDER / "base.css", folder / "style.css")
    return Markup("".join(sheet.read_text(encoding="utf-8") for sheet in sheets))


def picture(
    draw: Callable[[Axes], None],
    title: str,
    size: tuple[float, float],
    *,
    variables: Mapping[str, str] = VARIABLES,
    grid: Literal["x", "y"] = "y",
    settings: Mapping[str, Any] | None = None,
) -> Markup:
    """Draw on fresh axes; the inline SVG, the same for the same picture.

    ``size``: width and height in inches of 72 SVG units. ``variables``: see :func:`embed`. ``grid``: the axis with grid
    lines. ``settings``: matplotlib's, beyond those that all pictures share.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text: the page's font, and it can be searched
        "svg.hashsalt": title,  # ids in the SVG are random otherwise
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "figure.constrained_layout.use": True,
        **(settings or {}),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size)
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(axis=grid, color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        draw(axes)
        file = io.StringIO()
        canvas.print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return embed(file.getvalue(), title, variables)


def embed(svg: str, title: str, variables: Mapping[str, str]) -> Markup:
    """matplotlib's SVG file as an element of a page: no prolog or metadata, own ids, the page's colours and font.

    ``variables``: colours in the file -> the page's CSS variables, so that a picture follows light and dark. ``title``
    is what a screen reader says, and tells this picture's ids from those of others on the page.
    """
    prefix = re.sub(r"\W+", "-", title.lower())
    opening, rest = svg[svg.index("<svg") :].split(">", 1)
    opening = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", opening)
    svg = re.sub(r"<metadata>.*?</metadata>", "", f"{opening}>{rest}", flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg).replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # The figure's and the axes' own white background.
    svg = re.sub(r'(<g id="[^"]*patch_[12]">\s*<path d="[^"]*" style=")fill: #ffffff', r"\1fill: none", svg)
    for sentinel, variable in variables.items():
        svg = svg.replace(sentinel, f"var({variable})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))
