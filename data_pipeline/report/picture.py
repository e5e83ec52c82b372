"""The page's picture: the histogram of document lengths, inline SVG by matplotlib in the page's own colours.

Colours are drawn as sentinels and replaced by CSS variables, so that one picture serves the light and the dark page.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from data_pipeline.report.svg import embed

if TYPE_CHECKING:
    from data_pipeline.shards.summary import Lengths

INK, MUTED, GRID, BARS, LINE = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", BARS: "--bars", LINE: "--line"}
WIDTH, HEIGHT = 7.0, 3.4  # inches of 72 units: shown at 1.4 times that on a desk, 0.9 at 500 pixels
TITLE = "Document lengths"


def length_histogram(lengths: Lengths) -> Markup:
    """Share of the documents (bars) and of the tokens (line) by document length, two bins to the octave."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    edges = lengths.octaves(parts=2)
    documents, tokens = lengths.histogram(edges)
    style: Any = {
        "svg.fonttype": "none",  # text stays text: the page's font, and it can be searched
        "svg.hashsalt": TITLE,  # ids in the SVG are random otherwise
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "figure.constrained_layout.use": True,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        figure.patch.set_visible(False)
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.stairs(documents / lengths.documents, edges, fill=True, color=BARS)
        axes.stairs(tokens / lengths.tokens, edges, color=LINE, linewidth=1.8, baseline=None)
        median = lengths.percentile(50)
        axes.axvline(median, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.annotate(f"median {median:,}", (median, 1), (4, 6), xycoords=("data", "axes fraction"),
                      textcoords="offset points", color=INK, fontsize=10)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
        axes.set_xlabel("tokens in the document (log scale)")
        axes.set_ylabel("share")
        file = io.StringIO()
        canvas.print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return embed(file.getvalue(), TITLE, VARIABLES)
