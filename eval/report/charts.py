"""The report's pictures: inline SVG by matplotlib, in the page's own colours and font.

Colours are drawn as sentinels and replaced by CSS variables, so that one picture serves the light and the dark page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from data_pipeline.report import base
from data_pipeline.report.base import INK, MUTED
from eval.report.numbers import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAND, PAPER = "#040404", "#050505"
VARIABLES = {**base.VARIABLES, BAND: "--band", PAPER: "--paper"}
NUM_COLOURS = 6
# 72 units to the inch: a picture is 432 units wide, drawn at 1.0 to 1.25 of that on a desk and 0.8 on a phone.
WIDTH, HEIGHT = 6.0, 3.5
# Lengths of dashes and gaps, in widths of the line; () is a whole line.
DASHES: list[tuple[float, ...]] = [(), (5, 2), (1, 1.5), (6, 2, 1.5, 2)]
MARKERS = "os^Dv"


def colour(index: int) -> str:
    """The sentinel of a run's colour."""
    return f"#0600{index % NUM_COLOURS + 1:02x}"


def dash(index: int) -> Any:
    """Line style of a run, so that colour is not the only difference; changes when the colours are used up, too."""
    return (0, DASHES[index % len(DASHES)]) if DASHES[index % len(DASHES)] else "-"


def bars(rows: Sequence[tuple[str, float, float | None, int | None]], title: str, xlabel: str) -> Markup | None:
    """Horizontal bars from 0 to 1, the label above each: (label, value, std, run's colour or None for a control).

    A negative value, of a correlation, goes to the left of 0.
    """
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        for place, (label, value, std, index) in enumerate(rows):
            y = -place
            shade = MUTED if index is None else colour(index)
            axes.barh(y, value, height=0.34, color=shade, alpha=0.55 if index is None else 1.0)
            if std:
                axes.errorbar(value, y, xerr=std, color=INK, capsize=3, linewidth=1.3)
            axes.text(0, y + 0.26, label, va="bottom", color=INK, fontsize=11)
            shown = f"{value:.3f}" + (f" ± {std:.3f}" if std is not None else "")
            axes.text(1.0, y + 0.26, shown, va="bottom", ha="right", color=INK, fontsize=11)
        axes.set_xlim(min(0.0, *(1.05 * value for _, value, _, _ in rows)), 1)
        axes.set_ylim(-len(rows) + 0.6, 0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(xlabel)

    return picture(draw, title, height=0.62 + 0.5 * len(rows))


def picture(
    draw: Callable[[Axes], None],
    title: str,
    *,
    height: float = HEIGHT,
    tokens_axis: bool = False,
    y_format: Callable[..., str] | None = None,
) -> Markup:
    """Draw on fresh axes and return the SVG to be put into the page as it is."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def whole(axes: Axes) -> None:
        draw(axes)
        if tokens_axis:
            axes.set_xlabel("tokens seen")
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(FuncFormatter(compact))
        if y_format is not None:
            axes.yaxis.set_major_formatter(FuncFormatter(y_format))

    svg = base.picture(
        whole,
        title,
        (WIDTH, height),
        variables=VARIABLES,
        grid="x" if height != HEIGHT else "y",
        settings={"figure.constrained_layout.w_pad": 0.02, "figure.constrained_layout.h_pad": 0.02},
    )
    return Markup(re.sub(r"#0600(\d\d)", lambda match: f"var(--c{int(match[1])})", svg))
