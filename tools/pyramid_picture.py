"""Draw docs/pyramid.svg: which landmarks a token sees, flat and as a pyramid. ``python -m tools.pyramid_picture``."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.model.attention.pyramid import FLAT, Pyramid

PAGE = Path(__file__).resolve().parent.parent / "docs" / "pyramid.svg"
FAR, WINDOW = 44, 2
"""Segments before the window of the token that is drawn, and those of the window."""
SHOWN = Pyramid(levels=8, band=3, branching=2)
UNIT, ROW, LEFT, TOP = 15, 26, 118, 34
LEVEL_COLOURS = ("#2b6cb0", "#2f855a", "#b7791f", "#9b2c2c", "#6b46c1")
TOKEN, NEAR, FAINT, TEXT = "#1a202c", "#4a5568", "#cbd5e0", "#4a5568"


def _bar(first: int, last: int, row: int, fill: str, title: str) -> str:
    x, y, width = LEFT + first * UNIT, TOP + row * ROW, (last - first) * UNIT
    return (
        f'<rect x="{x + 1}" y="{y}" width="{width - 2}" height="18" rx="3" fill="{fill}"><title>{title}</title></rect>'
    )


def _label(text: str, row: int) -> str:
    return f'<text x="{LEFT - 10}" y="{TOP + row * ROW + 13}" text-anchor="end">{text}</text>'


def _note(text: str, x: float, y: float, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _seen(pyramid: Pyramid, top: int) -> list[str]:
    """One row for each level: the nodes seen in colour, the segments that coarser levels stand for in grey."""
    out = []
    ranges = pyramid.ranges(FAR)
    for level, (first, last) in enumerate(ranges):
        span = pyramid.branching**level
        count = "1 segment" if span == 1 else f"{span} segments"
        out.append(_label(f"level {level}: {count}" if len(ranges) > 1 else "landmarks", top + level))
        out += [
            _bar(j * span, (j + 1) * span, top + level, LEVEL_COLOURS[level % len(LEVEL_COLOURS)], f"{count}, node {j}")
            for j in range(first, last)
        ]
    for j in range(FAR, FAR + WINDOW):
        fill = NEAR if j < FAR + WINDOW - 1 else TOKEN
        out.append(_bar(j, j + 1, top, fill, "read token by token"))
    return out


def draw() -> str:
    """The picture, as SVG."""
    width = LEFT + (FAR + WINDOW) * UNIT + 16
    depth = len(SHOWN.ranges(FAR))
    under = 1 + 1  # the flat row and a row of space
    height = TOP + (under + depth) * ROW + 26
    x_token = LEFT + (FAR + WINDOW - 0.5) * UNIT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif" '
        f'font-size="12" fill="{TEXT}">',
        "<title>What a token sees: flat landmarks, and a pyramid</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _note(f"flat: {FLAT.seen(FAR)} landmarks, one for each segment", LEFT, TOP - 12),
        _note("window", x_token + 0.5 * UNIT, TOP - 12, "end"),
        *_seen(FLAT, 0),
        _note(
            f"pyramid, band {SHOWN.band}, branching {SHOWN.branching}: {SHOWN.seen(FAR)} nodes",
            LEFT,
            TOP + under * ROW - 12,
        ),
        *_seen(SHOWN, under),
        _note("text from its start", LEFT, height - 10),
        _note("the token", x_token + 0.5 * UNIT, height - 10, "end"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools.pyramid_picture", description="Draw the pyramid of landmarks.")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    args.out.write_text(draw(), encoding="utf-8")
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
