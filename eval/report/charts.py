"""The report's pictures: inline SVG by matplotlib, in the page's own colours and font.

Colours are drawn as sentinels and replaced by CSS variables, so that one picture serves the light and the dark page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from data_pipeline.report.svg import embed
from eval.report.runs import Run, Stage
from eval.results.schema import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, BAND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", BAND: "--band", PAPER: "--paper"}
NUM_COLOURS = 6
# 72 units to the inch: a picture is 432 units wide, drawn at 1.0 to 1.25 of that on a desk and 0.8 on a phone.
WIDTH, HEIGHT = 6.0, 3.5
DASHES = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1.5, 2))]


def colour(index: int) -> str:
    """The sentinel of a run's colour."""
    return f"#0600{index % NUM_COLOURS + 1:02x}"


def dash(index: int) -> Any:
    """Line style of a run, so that colour is not the only difference; changes when the colours are used up, too."""
    return DASHES[index % len(DASHES)]


def loss(runs: Sequence[tuple[int, Run]], title: str) -> Markup | None:
    """Training and held-out loss by tokens of runs with one objective, the curriculum's stages behind."""
    if not any(run.train or run.valid for _, run in runs):
        return None

    def draw(axes: Axes) -> None:
        floors = []
        for index, run in runs:
            x, y = columns(run.train, "loss")
            if len(x) > 60:
                axes.plot(x, y, color=colour(index), linewidth=0.7, alpha=0.3)
                y = smooth(y)
            axes.plot(x, y, color=colour(index), linewidth=1.7, linestyle=dash(index))
            x, y = columns(run.valid, "loss")
            axes.plot(x, y, "o", color=colour(index), markersize=6.5, markeredgecolor=PAPER, markeredgewidth=1)
            lm = run.results.get("lm")
            if lm is not None and "unigram_entropy" in lm.metrics:
                floors.append(lm.metrics["unigram_entropy"].value)
        for value in sorted({round(value, 2) for value in floors})[:1]:
            axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(
                "unigram entropy", (1, value), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", color=MUTED, fontsize=10,
            )  # fmt: skip
        axes.set_ylabel("loss, nats per target")
        stage_bands(axes, runs)

    return picture(draw, title, tokens_axis=True)


def over_tokens(
    runs: Sequence[tuple[int, Run]], key: str, ylabel: str, title: str, *, log: bool = False, share: bool = False
) -> Markup | None:
    """One quantity of the training records by tokens, for all runs."""
    lines = [(index, *columns(run.train, key)) for index, run in runs]
    if not any(x for _, x, _ in lines):
        return None

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        for index, x, y in lines:
            axes.plot(x, y, color=colour(index), linewidth=1.5, linestyle=dash(index))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(ylabel)
        stage_bands(axes, runs)

    return picture(draw, title, tokens_axis=True, y_format=percent if share else engineering)


def curves(lines: Sequence[tuple[int, Series]], title: str) -> Markup | None:
    """Series of evaluation results over a logarithmic x axis."""
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        for index, series in lines:
            axes.plot(
                series.x, series.y, color=colour(index), linewidth=1.7, marker="o", markersize=4, linestyle=dash(index)
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axes.set_xlabel(lines[0][1].xlabel)
        axes.set_ylabel(lines[0][1].ylabel)

    return picture(draw, title)


def bars(rows: Sequence[tuple[str, float, float | None, int | None]], title: str) -> Markup | None:
    """Horizontal bars from 0 to 1, the label above each: (label, value, std, run's colour or None for a control)."""
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
        axes.set_xlim(0, 1)
        axes.set_ylim(-len(rows) + 0.6, 0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("accuracy on the test file")

    return picture(draw, title, height=0.62 + 0.5 * len(rows))


def columns(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Tokens and the values of ``key`` where it is a finite number."""
    kept = [
        (float(r["tokens"]), float(r[key]))
        for r in records
        if isinstance(r.get(key), int | float) and math.isfinite(r[key])
    ]
    return [x for x, _ in kept], [y for _, y in kept]


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about 2% of the points, corrected for its start."""
    keep = 1 - 1 / max(len(values) / 50, 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def stage_bands(axes: Axes, runs: Sequence[tuple[int, Run]]) -> None:
    """The curriculum behind the curves: whole bands where all runs share it, else a strip for each run at the top."""
    curricula = [(index, run.stages()) for index, run in runs if run.stages()]
    low, high = 0.0, max((stage.end for _, stages in curricula for stage in stages), default=0.0)
    if not high:
        return
    axes.set_xlim(low, high * 1.01)
    longest = max((stages for _, stages in curricula), key=len)
    # A run that stopped early still has the same curriculum as far as it goes.
    shared = all(
        [(s.start, s.seq_len) for s in stages] == [(s.start, s.seq_len) for s in longest[: len(stages)]]
        for _, stages in curricula
    )
    if shared:
        furthest = max(
            (stages for _, stages in curricula if len(stages) == len(longest)), key=lambda stages: stages[-1].end
        )
        curricula = [(0, furthest)]
    for row, (index, stages) in enumerate(curricula):
        top = 1.0 if shared else 1.0 - 0.075 * row
        bottom = 0.0 if shared else top - 0.06
        for number, stage in enumerate(stages):
            _band(axes, stage, number, (bottom, top), BAND if shared else colour(index), whole=shared)
            if stage.end - stage.start > 0.07 * high:
                unit = " tokens" if number == 0 and shared and stage.end - stage.start > 0.2 * high else ""
                axes.annotate(
                    f"{stage.seq_len:,}{unit}", ((stage.start + stage.end) / 2, top), (0, -3 if shared else -1.5),
                    xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="top",
                    color=MUTED if shared else INK, fontsize=10 if shared else 8.5,
                )  # fmt: skip
    # Room for the labels above the curves: a share of the axis, in its own scale.
    room = 0.09 * len(curricula)
    bottom, top = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(bottom, top * (top / bottom) ** room)
    else:
        axes.set_ylim(bottom, top + (top - bottom) * room)


def _band(axes: Axes, stage: Stage, number: int, span: tuple[float, float], shade: str, *, whole: bool) -> None:
    if whole and number % 2 == 0:
        axes.axvspan(stage.start, stage.end, *span, color=shade, linewidth=0, zorder=0)
    elif not whole:
        axes.axvspan(stage.start, stage.end, *span, color=shade, alpha=(0.18, 0.38)[number % 2], linewidth=0, zorder=0)


def engineering(value: float, _: Any = None) -> str:
    """1500000 as 1.5M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def percent(value: float, _: Any = None) -> str:
    """0.015 as 1.5%."""
    return f"{100 * value:.3g}%"


def picture(
    draw: Callable[[Axes], None],
    title: str,
    *,
    height: float = HEIGHT,
    tokens_axis: bool = False,
    y_format: Callable[..., str] | None = None,
) -> Markup:
    """Draw on fresh axes and return the SVG to be put into the page as it is."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
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
        "figure.constrained_layout.w_pad": 0.02,
        "figure.constrained_layout.h_pad": 0.02,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height))
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(axis="x" if height != HEIGHT else "y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        draw(axes)
        if tokens_axis:
            axes.set_xlabel("tokens seen")
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(FuncFormatter(engineering))
        if y_format is not None:
            axes.yaxis.set_major_formatter(FuncFormatter(y_format))
        file = io.StringIO()
        canvas.print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = embed(file.getvalue(), title, VARIABLES)
    return Markup(re.sub(r"#0600(\d\d)", lambda match: f"var(--c{int(match[1])})", svg))
