"""The page's picture: the histogram of document lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from data_pipeline.report import base
from data_pipeline.report.base import INK, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from data_pipeline.shards.summary import Lengths

BARS, LINE = "#040404", "#050505"
VARIABLES = {**base.VARIABLES, BARS: "--bars", LINE: "--line"}
WIDTH, HEIGHT = 7.0, 3.4  # inches of 72 units: shown at 1.4 times that on a desk, 0.9 at 500 pixels
TITLE = "Document lengths"


def length_histogram(lengths: Lengths) -> Markup:
    """Share of the documents (bars) and of the tokens (line) by document length, two bins to the octave."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    edges = lengths.octaves(parts=2)
    documents, tokens = lengths.histogram(edges)
    median = lengths.percentile(50)

    def draw(axes: Axes) -> None:
        axes.figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.stairs(documents / lengths.documents, edges, fill=True, color=BARS)
        axes.stairs(tokens / lengths.tokens, edges, color=LINE, linewidth=1.8, baseline=None)
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

    return picture(draw, TITLE, (WIDTH, HEIGHT), variables=VARIABLES)
