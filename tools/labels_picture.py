"""Draws the picture of docs/imdb.md from results of ``classify --labels``: ``python -m tools.labels_picture FILE ...``.

Accuracy by number of labels, with 95% intervals: pretrained, from random weights, TF-IDF.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.result_picture import CAUSAL, CHECKOUT, GRID, MASKED, MUTED, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = (
    ("pretrained", "", MASKED, "s"),
    ("TF-IDF", "tfidf_", MUTED, "D"),
    ("random weights", "scratch_", CAUSAL, "o"),
)
"""Name, prefix of its metrics, colour, marker."""
SIZE = (8.0, 3.4)
LINE = 0.06
"""Height of a line of words, as a share of the axis."""
SAID = "Accuracy by number of labelled reviews: pretrained, TF-IDF, and the same network from random weights"


def draw_accuracies(axes: Axes, files: Sequence[Path]) -> None:
    """A line for each predictor, over a logarithmic axis; the last accuracy at its end. Of a number of labels that
    several files have, the last file's figures."""
    metrics: dict[str, Any] = {}
    for file in files:
        metrics |= json.loads(file.read_text(encoding="utf-8"))["metrics"]
    labels = sorted(int(name.rpartition("_")[2]) for name in metrics if name.startswith("accuracy_at_"))
    ends: list[tuple[float, str, str]] = []
    for name, prefix, colour, marker in ROWS:
        points = [metrics[f"{prefix}accuracy_at_{count}"] for count in labels]
        values = [point["value"] for point in points]
        axes.plot(labels, values, color=colour, marker=marker, markersize=5, linewidth=1.8)
        axes.vlines(labels, [p["low"] for p in points], [p["high"] for p in points], color=colour, linewidth=2.2)
        ends.append((values[-1], f"{name} {values[-1]:.3f}", colour))
    low, high = axes.get_ylim()
    place = low
    for value, words, colour in sorted(ends):
        place = max(value, place)  # above the one below, where two lines end close together
        at = ("offset points", "data")
        axes.annotate(words, (labels[-1], value), (9, place), textcoords=at, color=colour, verticalalignment="center")
        place += LINE * (high - low)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(labels, [f"{count:,}" for count in labels])
    axes.set_title("accuracy on test reviews [95% interval], by labelled reviews to train on")
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture; raises ``OSError`` for a result that is not there."""
    parser = argparse.ArgumentParser(prog="tools.labels_picture", description="Draw the picture of docs/imdb.md.")
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="FILE", help="results of `nystrom eval classify --labels`"
    )
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs" / "imdb.svg")
    args = parser.parse_args(argv)
    picture = svg_of([((0.06, 0.10, 0.72, 0.78), draw_accuracies)], args.results, SIZE, SAID)
    args.out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
