"""Heat maps: inline SVG of a fixed size, so that the values stay readable and a wide one scrolls in its own box.

The colour of a cell is that of the scale's low end with the high end laid over it at the share of the value. Both are
CSS variables, so one picture serves the light and the dark page. The text is black or white, by where the share lies:
``LIGHT_TURNS`` and ``DARK_TURNS`` are the shares at which it has to change on either page to keep a contrast of 4.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from eval.report.numbers import compact
from eval.results.schema import Grid

LIGHT_TURNS, DARK_TURNS = 0.685, 0.47
# Beyond these a cell is too small for its value, which is then only in its tooltip.
MOST_COLUMNS, MOST_ROWS = 24, 40
LETTER = 6.9  # width of a character of 12 px, in px
ROW, SMALL = 26, 12


@dataclass(frozen=True)
class Scale:
    """The values at the ends of the colours."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end, cut beyond them."""
        if self.high <= self.low:
            return 1.0 if value >= self.high else 0.0
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


def scale_of(grids: Sequence[Grid]) -> Scale:
    """One scale for the grids of several runs: their own ends where given, else the least and greatest value."""
    values = [v for grid in grids for row in grid.values for v in row if v is not None and math.isfinite(v)]
    lows = [grid.low for grid in grids if grid.low is not None] or [min(values, default=0.0)]
    highs = [grid.high for grid in grids if grid.high is not None] or [max(values, default=1.0)]
    return Scale(float(min(lows)), float(max(highs)))


def short(value: float, scale: Scale) -> str:
    """A value in at most six characters: two decimals where the scale is of shares."""
    if scale.low >= 0 and 0.1 <= scale.high <= 1:
        return f"{value:.2f}"
    size = abs(value)
    if value == 0 or size >= 1000:
        return compact(value)
    if size < 1e-3:
        return f"{value:.0e}"
    return f"{value:.3f}" if size < 0.1 else f"{value:.2f}" if size < 10 else f"{value:.0f}"


def text_class(share: float) -> str:
    """ "lo": black on the light page, white on the dark; "mid": black on both; "hi": white on light, black on dark."""
    return "lo" if share < DARK_TURNS else "mid" if share < LIGHT_TURNS else "hi"


def heatmap(grid: Grid, scale: Scale, title: str) -> Markup:
    """The picture. None is hatched; the page must hold the pattern ``hatch``."""
    grid = replace(grid, x=_bare(grid.x, grid.xlabel), y=_bare(grid.y, grid.ylabel))
    small = len(grid.x) > MOST_COLUMNS or len(grid.y) > MOST_ROWS
    texts = [[None if v is None or not math.isfinite(v) else short(v, scale) for v in row] for row in grid.values]
    longest = max([len(text) for row in texts for text in row if text] + [0 if small else len(x) for x in grid.x] + [3])
    width = SMALL if small else max(38, round(longest * LETTER) + 6)
    height = SMALL if small else ROW
    left = round(min(max([len(y) for y in grid.y], default=1), 22) * LETTER) + 14
    top = 20
    right, bottom = left + width * len(grid.x), top + height * len(grid.y)
    labels = max(right, left + round(len(grid.xlabel) * LETTER), round(len(grid.ylabel) * LETTER)) + 2
    items: list[Markup] = [_text(0, 12, grid.ylabel, "name")]
    for i, (name, row) in enumerate(zip(grid.y, grid.values, strict=True)):
        y = top + i * height
        if not small or i % _every(len(grid.y), SMALL, 16) == 0:
            items.append(_text(left - 6, y + height / 2, _cut(name), "tick", anchor="end"))
        for j, value in enumerate(row):
            items.append(_cell(left + j * width, y, width, height, value, texts[i][j], scale, small, (name, grid.x[j])))
    every = _every(len(grid.x), width, round(max([len(x) for x in grid.x], default=1) * LETTER) + 6)
    for j, name in enumerate(grid.x):
        if j % every == 0:
            items.append(_text(left + (j + 0.5) * width, bottom + 12, name, "tick", anchor="middle"))
    items.append(_text(left, bottom + 30, grid.xlabel, "name"))
    size = Markup('width="{w}" height="{h}" viewBox="0 0 {w} {h}"').format(w=labels, h=bottom + 40)
    return Markup('<svg class="heat" role="img" aria-label="{}" {}>{}</svg>').format(
        title, size, Markup("").join(items)
    )


def _cell(
    x: float, y: float, w: float, h: float, value: float | None, text: str | None,
    scale: Scale, small: bool, place: tuple[str, str],
) -> Markup:  # fmt: skip
    box = Markup('x="{:g}" y="{:g}" width="{:g}" height="{:g}"').format(x + 0.5, y + 0.5, w - 1, h - 1)
    where = f"{place[0]}, {place[1]}"
    if value is None or text is None:
        return Markup('<rect {} fill="url(#hatch)"><title>{}: none</title></rect>').format(box, where)
    share = scale.share(value)
    parts = Markup('<rect {} class="low"/><rect {} class="high" fill-opacity="{:.3f}">').format(box, box, share)
    parts += Markup("<title>{}: {:g}</title></rect>").format(where, value)
    return parts if small else parts + _text(x + w / 2, y + h / 2, text, text_class(share), anchor="middle")


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:g}" y="{:g}" class="{}" text-anchor="{}">{}</text>').format(
        x, y, kind, anchor, escape(text)
    )


def _bare(labels: Sequence[object], name: str) -> list[str]:
    """The labels without the axis' name where all of them repeat it: "head 3" on the axis "head" is "3"."""
    texts = [str(label) for label in labels]
    prefix = f"{name} "
    return [t.removeprefix(prefix) for t in texts] if all(t.startswith(prefix) for t in texts) else texts


def _cut(text: str) -> str:
    return text if len(text) <= 22 else text[:21] + "…"


def _every(count: int, size: float, need: float) -> int:
    """Every how many-th of ``count`` labels there is room for."""
    return max(1, math.ceil(need / size)) if count else 1
