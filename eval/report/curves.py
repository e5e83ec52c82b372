"""Curves of evaluation results: those of one chart in one picture, for all runs, with a legend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from eval.report.charts import DASHES, MARKERS, MUTED, NUM_COLOURS, PAPER, colour, dash, picture
from eval.report.compare import Member
from eval.report.numbers import compact
from eval.results.schema import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Curves in one picture beyond which every run gets its own.
MOST_LINES = 8
# More points than this are drawn without markers.
MOST_MARKERS = 40
# Letters of a label that fit along the y axis.
LONGEST_LABEL = 38
# From here on the values span orders of magnitude and are drawn on a logarithmic axis.
LOG_SPAN = 300.0


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn: places in the lists of colours (None: grey, a reference), dashes and markers."""

    series: Series
    label: str
    colour: int | None
    dash: int
    marker: int
    doubt: str = ""

    @property
    def key(self) -> Markup:
        """What stands before its name in the legend."""
        shade = "ref" if self.colour is None else f"c{self.colour % NUM_COLOURS + 1}"
        pattern = " ".join(f"{1.7 * length:g}" for length in DASHES[self.dash % len(DASHES)])
        return Markup(
            '<svg class="key {}" width="30" height="10" viewBox="0 0 30 10" aria-hidden="true">'
            '<path d="M0 5H30" stroke-dasharray="{}"/>{}</svg>'
        ).format(shade, pattern or "none", "" if self.colour is None else _SHAPES[self.marker % len(MARKERS)])


@dataclass(frozen=True)
class Chart:
    """A picture with its heading, its legend and what stands below."""

    title: str
    picture: Markup
    lines: list[Line]
    caption: str


_SHAPES = [
    Markup('<circle cx="15" cy="5" r="3"/>'),
    Markup('<path class="dot" d="M12 2h6v6h-6z"/>'),
    Markup('<path class="dot" d="M15 1.5l3.6 6.5h-7.2z"/>'),
    Markup('<path class="dot" d="M15 1l4 4-4 4-4-4z"/>'),
    Markup('<path class="dot" d="M15 8.5l3.6-6.5h-7.2z"/>'),
]


def charts_of(members: Sequence[Member], context: str) -> list[Chart]:
    """The charts of one group of results; ``context`` tells them from those of other groups."""
    groups: dict[tuple[str, str, str, str], list[tuple[Member, Series]]] = {}
    for member in members:
        for series in member.result.series:
            key = (series.chart or series.name, series.xlabel, series.ylabel, series.scale)
            groups.setdefault(key, []).append((member, series))
    charts: list[Chart] = []
    for number, ((name, *_), found) in enumerate(groups.items(), 1):
        own = [pair for pair in found if not pair[1].reference]
        indices = list(dict.fromkeys(member.index for member, _ in own))
        crowded = len(indices) > 1 and len(own) > max(MOST_LINES, len(indices))
        for place, part in enumerate([[i] for i in indices] if crowded else [indices]):
            chosen = [pair for pair in own if pair[0].index in part]
            lines = _lines(chosen, [(m, s) for m, s in found if s.reference and (not crowded or m.index in part)])
            heading = f"{name}: {chosen[0][0].run.name}" if crowded else name
            drawn = _draw(lines, f"{context}, {number}.{place}: {heading}")
            charts += [Chart(heading, drawn, lines, _caption(lines))] if drawn else []
    return charts


def _lines(own: Sequence[tuple[Member, Series]], references: Sequence[tuple[Member, Series]]) -> list[Line]:
    """Runs are told by colour and series by dash and marker; where there is one of either, the other gets both.

    A reference that is the same in all runs is drawn once; those of one name that differ are named by their runs.
    """
    names = list(dict.fromkeys(series.name for _, series in own))
    common = _beginning([*names, *(s.name for _, s in references)])
    runs = list(dict.fromkeys(member.index for member, _ in own))
    lines = []
    for member, series in own:
        rank = names.index(series.name)
        if len(names) == 1:
            label, shade, style = member.run.name, member.index, member.index if len(runs) > 1 else 0
        elif len(runs) == 1:
            label, shade, style = series.name[common:], rank, rank // NUM_COLOURS
        else:
            label, shade, style = f"{member.run.name}: {series.name[common:]}", member.index, rank
        lines.append(Line(series, label, shade, style, rank if len(runs) > 1 else style, member.doubt))
    unique: dict[tuple[str, str, str], tuple[Member, Series]] = {}
    for member, series in references:
        unique.setdefault((series.name, str(series.x), str(series.y)), (member, series))
    count = Counter(name for name, *_ in unique)
    for i, (member, series) in enumerate(unique.values()):
        label = series.name[common:] if count[series.name] == 1 else f"{member.run.name}: {series.name[common:]}"
        lines.append(Line(series, label, None, 1 + i, 0))
    return lines


def _beginning(names: Sequence[str]) -> int:
    """Length of what all names begin with, up to a comma or colon: it is the chart's and says nothing of a curve."""
    first, last = min(names, default=""), max(names, default="")  # the two that have least in common
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    if len(names) < 2:
        return 0
    return max(shared.rfind(mark) + len(mark) if mark in shared else 0 for mark in (", ", ": "))


def _caption(lines: Sequence[Line]) -> str:
    banded = any(line.series.low is not None and line.series.high is not None for line in lines)
    grey = any(line.colour is None for line in lines)
    return " ".join(["Shaded: the interval of each value."] * banded + ["Grey: for reference."] * grey)


def _points(series: Series) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, y and the bounds of the points that can be drawn, by x."""
    lows, highs = (series.low or series.y, series.high or series.y)
    kept = sorted(
        (
            (float(x), float(y), float(y if low is None else low), float(y if high is None else high))
            for x, y, low, high in zip(series.x, series.y, lows, highs, strict=True)
            if _drawable(x) and _drawable(y)
        ),
        key=lambda point: point[0],
    )
    x, y, low, high = ([point[i] for point in kept] for i in range(4))
    return x, y, low, high


def _drawable(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _draw(lines: Sequence[Line], title: str) -> Markup | None:
    points = [_points(line.series) for line in lines]
    if not any(x for x, *_ in points):
        return None
    series = lines[0].series
    all_x = sorted({value for x, *_ in points for value in x})
    all_y = [value for _, *columns in points for column in columns for value in column]

    def draw(axes: Axes) -> None:
        for line, (x, y, low, high) in zip(lines, points, strict=True):
            shade = MUTED if line.colour is None else colour(line.colour)
            if line.series.low is not None and line.series.high is not None:
                axes.fill_between(x, low, high, color=shade, alpha=0.16, linewidth=0)
            marked = line.colour is not None and len(x) <= MOST_MARKERS
            axes.plot(
                x, y, color=shade, linewidth=1.3 if line.colour is None else 1.7, linestyle=dash(line.dash),
                marker=MARKERS[line.marker % len(MARKERS)] if marked else None,
                markersize=5.5, markeredgecolor=PAPER, markeredgewidth=0.6,
                zorder=2 if line.colour is None else 3,
            )  # fmt: skip
        _x_axis(axes, series.scale, all_x)
        _y_axis(axes, all_y)
        axes.set_xlabel(series.xlabel)
        axes.set_ylabel(series.ylabel, fontsize=11 * min(1.0, LONGEST_LABEL / max(len(series.ylabel), 1)))

    return picture(draw, title)


def _x_axis(axes: Axes, scale: str, values: Sequence[float]) -> None:
    """The series' scale; measured places as ticks where they are few and whole, as lengths and depths are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    logarithmic = scale.startswith("log") and values[0] > 0
    if logarithmic:
        base = 10 if scale in ("log", "log10") else 2
        axes.set_xscale("log", base=base)
        axes.xaxis.set_major_locator(LogLocator(base=base, numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    if len(values) <= 7 and (logarithmic or all(v == int(v) for v in values)) and _apart(values, logarithmic):
        axes.set_xticks(values)


def _apart(values: Sequence[float], logarithmic: bool) -> bool:
    """Whether ticks at these places leave room for their labels."""
    if not all(v == int(v) for v in values):
        return False
    places = [math.log(v) for v in values] if logarithmic else list(values)
    span = places[-1] - places[0]
    return all(b - a >= span / 9 for a, b in pairwise(places))


def _tick(value: float, _: Any = None) -> str:
    if value != int(value):
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) < 1e5 else compact(value)


def _y_axis(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_SPAN:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    elif low >= 0 and high <= 1 and high - low > 0.4:
        axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick if high < 1e4 else compact))
