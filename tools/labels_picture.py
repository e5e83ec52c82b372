"""Draws the picture of docs/imdb.md from results of ``classify --labels``: ``python -m tools.labels_picture FILE ...``.

Accuracy by number of labels, with 95% intervals: pretrained, from random weights, TF-IDF. A panel for masked models,
and one for causal models.
"""

from __future__ import annotations

import argparse
import functools
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
PANELS = {"mlm": "masked model", "clm": "causal model"}
SIZE = (8.0, 3.4)
LINE = 0.06
"""Height of a line of words, as a share of the axis."""
SAID = "Accuracy by number of labelled reviews: pretrained, TF-IDF, and the same network from random weights"


def read_metrics(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Of each objective its metrics. Of a number of labels that several files have, the last file's figures."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(result["model"]["objective"], {}).update(result["metrics"])
    return {objective: found[objective] for objective in PANELS if objective in found}


def labels_of(metrics: dict[str, Any]) -> list[int]:
    """The numbers of labels that it has accuracies for."""
    return sorted(int(name.rpartition("_")[2]) for name in metrics if name.startswith("accuracy_at_"))


def draw_accuracies(objective: str, axes: Axes, results: dict[str, dict[str, Any]]) -> None:
    """A line for each predictor, over a logarithmic axis; the last accuracy at its end. All panels share scales."""
    metrics = results[objective]
    labels = labels_of(metrics)
    ticks = sorted(set().union(*map(labels_of, results.values())))
    every = [point for own in results.values() for name, point in own.items() if "accuracy_at_" in name]
    low, high = min(point["low"] for point in every), max(point["high"] for point in every)
    axes.set_ylim(low - 0.02, high + 0.02)
    ends: list[tuple[float, str, str]] = []
    for name, prefix, colour, marker in ROWS:
        points = [metrics[f"{prefix}accuracy_at_{count}"] for count in labels]
        values = [point["value"] for point in points]
        axes.plot(labels, values, color=colour, marker=marker, markersize=5, linewidth=1.8)
        axes.vlines(labels, [p["low"] for p in points], [p["high"] for p in points], color=colour, linewidth=2.2)
        ends.append((values[-1], f"{name} {values[-1]:.3f}", colour))
    place = low
    for value, words, colour in sorted(ends):
        place = max(value, place)  # above the one below, where two lines end close together
        at = ("offset points", "data")
        axes.annotate(words, (labels[-1], value), (9, place), textcoords=at, color=colour, verticalalignment="center")
        place += LINE * (high - low)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.set_title(f"{PANELS[objective]}: accuracy by labelled reviews")
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture; raises ``OSError`` for a result that is not there."""
    parser = argparse.ArgumentParser(prog="tools.labels_picture", description="Draw the picture of docs/imdb.md.")
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="FILE", help="results of `nystrom eval classify --labels`"
    )
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs" / "imdb.svg")
    args = parser.parse_args(argv)
    results = read_metrics(args.results)
    share = 0.98 / len(results)
    panels = [
        ((0.06 + index * share, 0.10, share - 0.20, 0.78), functools.partial(draw_accuracies, objective))
        for index, objective in enumerate(results)
    ]
    args.out.write_text(svg_of(panels, results, SIZE, SAID), encoding="utf-8")


if __name__ == "__main__":
    main()
