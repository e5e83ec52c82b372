"""One self-contained HTML page about a shard folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from data_pipeline.report import base
from data_pipeline.report.base import INK, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from data_pipeline.shards.summary import Lengths

FOLDER = Path(__file__).parent
TOP_SOURCES = 20
BARS, LINE = "#040404", "#050505"
VARIABLES = {**base.VARIABLES, BARS: "--bars", LINE: "--line"}
# Inches of 72 units. The wide picture is shown at 1.4 times that on a desk; below 600 pixels, where its labels would be
# too small to read, the narrow one is shown instead, at about its own size.
WIDE, NARROW = (7.0, 3.4), (4.8, 3.6)
TITLE = "Document lengths"


def render(contents: dict[str, Any], lengths: Lengths) -> str:
    """The whole page, from :func:`data_pipeline.report.contents.contents` and the lengths for the picture.

    It loads nothing from anywhere. All that comes from the data is escaped; only our own SVG goes in as it is. No time
    and no path: equal shards in folders of equal name give equal pages.
    """
    environment = base.environment(FOLDER)
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["percent"] = percent
    environment.filters["setting"] = setting
    return environment.get_template("page.html").render(
        **contents,
        pictures=[("wide", length_histogram(lengths)), ("narrow", length_histogram(lengths, narrow=True))],
        top_sources=contents["sources"][:TOP_SOURCES],
        style=base.style(FOLDER),
    )


def percent(share: float) -> str:
    """0.0153 as 1.53%; three significant digits."""
    if share == 0:
        return "0%"
    value = 100 * share
    return "<0.001%" if value < 0.001 else f"{value:.0f}%" if value >= 99.95 else f"{value:#.3g}%"


def setting(value: Any) -> str:
    """A setting of the manifest as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)


def length_histogram(lengths: Lengths, *, narrow: bool = False) -> Markup:
    """Share of the documents (bars) and of the tokens (line) by document length, two bins to the octave; ``narrow``:
    drawn for a phone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    edges = lengths.log2_edges(parts=2)
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
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=5 if narrow else 9))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
        axes.set_xlabel("tokens in the document (log scale)")
        axes.set_ylabel("share")

    return picture(draw, f"{TITLE}, narrow" if narrow else TITLE, NARROW if narrow else WIDE, variables=VARIABLES)
