"""Draws the picture at the head of README.md from a finished demo: ``python -m tools.result_picture demo``.

On the left is what both models learn, beside the loss of knowing only how frequent tokens are. On the right is what
that is worth on labelled texts, with 95% intervals, beside the baselines. Every number is read from the runs' files.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

What = TypeVar("What")
CHECKOUT = Path(__file__).resolve().parent.parent
# What matplotlib draws -> what the picture has: on light ground, and on dark. Okabe and Ito's hues, at least 3:1.
COLOURS = {
    "#010101": ("ink", "#1b2330", "#e4e8ee"),
    "#020202": ("muted", "#5b6675", "#9aa5b5"),
    "#030303": ("grid", "#d9dee6", "#333c4a"),
    "#040404": ("paper", "#ffffff", "#14181f"),
    "#050505": ("masked", "#0072b2", "#56b4e9"),
    "#060606": ("causal", "#c94f00", "#f0894a"),
}
INK, MUTED, GRID, PAPER, MASKED, CAUSAL = COLOURS
MODELS = (("masked", "demo-mlm", "masked_loss", MASKED, "s"), ("causal", "demo-clm", "loss", CAUSAL, "o"))
"""Name, run, the metric of its held-out loss, colour, marker."""
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
SIZE = (8.0, 3.3)
"""Inches of 100 units: on GitHub the picture is some 800 pixels wide."""
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "result", "font.family": "DejaVu Sans", "font.size": 9.5,
    "text.color": INK, "axes.edgecolor": GRID, "axes.facecolor": PAPER, "figure.facecolor": PAPER,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": INK,
    "axes.axisbelow": True,
}  # fmt: skip
"""For matplotlib."""
SAID = "Loss of both models while they train, and accuracies of classification with intervals beside baselines"


def metrics_of(run: Path, suite: str) -> dict[str, Any]:
    """The metrics of a result by name."""
    return json.loads((run / "eval" / f"{suite}.json").read_text(encoding="utf-8"))["metrics"]


def losses_of(run: Path, kind: str) -> tuple[list[float], list[float]]:
    """Tokens seen and the loss, of the steps (``train``) or of the validations (``valid``)."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == kind]
    rows = [row for row in rows if kind == "train" or row["loss"] is not None]
    # A batch without a target has a null loss: a gap in the line.
    return [row["tokens"] for row in rows], [math.nan if row["loss"] is None else row["loss"] for row in rows]


def draw_losses(axes: Axes, runs: Path) -> None:
    """Loss by tokens: steps as a thin line, validations as points, the baseline dashed."""
    for name, folder, metric, colour, marker in MODELS:
        run, baseline = runs / folder, metrics_of(runs / folder, "lm")["unigram_entropy"]["value"]
        axes.plot(*losses_of(run, "train"), color=colour, alpha=0.35, linewidth=1.2)
        tokens, losses = losses_of(run, "valid")
        axes.plot(tokens, losses, color=colour, marker=marker, markersize=5, linewidth=1.8)
        end = metrics_of(run, "lm")[metric]["value"]
        axes.annotate(f"{name} {end:.2f}", (tokens[-1], losses[-1]), (7, -3), textcoords="offset points", color=colour)
        axes.axhline(baseline, color=colour, linestyle=(0, (4, 3)), linewidth=1.1)
    baselines = [metrics_of(runs / folder, "lm")["unigram_entropy"]["value"] for _, folder, *_ in MODELS]
    axes.annotate(
        "knowing only frequencies", (1.36 * tokens[-1], max(baselines)), (0, 4), textcoords="offset points",
        color=MUTED, ha="right", fontsize=8.5,
    )  # fmt: skip
    axes.set_xlim(0, 1.36 * tokens[-1])
    axes.set_xticks([0, 200_000, 400_000, 600_000], ["0", "200k", "400k", "600k"])
    axes.set_title("nats a token, by tokens seen (points: held out)")
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def rows_of(runs: Path) -> list[tuple[str, dict[str, Any], str, str]]:
    """Label, accuracy, colour and marker of each row of the right panel, best baseline first."""
    found = []
    for name, folder, _, colour, marker in MODELS:
        metrics = metrics_of(runs / folder, "classify")
        found += [
            (f"{name}, fine-tuned", metrics["accuracy"], colour, marker),
            (f"{name}, random weights", metrics["scratch_accuracy"], colour, marker),
        ]
    return [
        ("TF-IDF", metrics["tfidf_accuracy"], MUTED, "D"),
        *reversed(found[2:]), *reversed(found[:2]),
        ("most frequent class", metrics["majority_accuracy"], MUTED, "D"),
    ]  # fmt: skip


def draw_accuracies(axes: Axes, runs: Path) -> None:
    """Accuracies with their 95% intervals, the numbers at the right."""
    rows = rows_of(runs)
    for place, (label, metric, colour, marker) in enumerate(rows):
        low, value, high = metric["low"], metric["value"], metric["high"]
        trained = "random" not in label
        axes.plot([low, high], [-place, -place], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot(value, -place, marker, color=colour, markersize=6.5, markerfacecolor=colour if trained else PAPER)
        axes.text(1.05, -place, f"{value:.2f} [{low:.2f}, {high:.2f}]", va="center", color=INK, fontsize=8.5)
    axes.set_yticks([-place for place in range(len(rows))], [row[0] for row in rows])
    axes.set_xlim(0.15, 1.01)
    axes.set_ylim(-len(rows) + 0.5, 0.5)
    axes.set_xticks([0.2, 0.4, 0.6, 0.8, 1], ["0.2", "0.4", "0.6", "0.8", "1"])
    axes.tick_params(axis="y", length=0)
    axes.set_title("accuracy, ten classes [95% interval]")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.spines["left"].set_visible(False)


def draw(runs: Path) -> str:
    """The SVG of the runs ``demo-mlm`` and ``demo-clm`` in a folder."""
    return svg_of(
        [((0.05, 0.10, 0.35, 0.77), draw_losses), ((0.645, 0.10, 0.19, 0.77), draw_accuracies)], runs, SIZE, SAID
    )


def svg_of(
    panels: Sequence[tuple[tuple[float, float, float, float], Callable[[Axes, What], None]]],
    what: What,
    size: tuple[float, float],
    said: str,
) -> str:
    """Panels in a picture of ``size``, each at (left, bottom, width, height) and drawn from the files ``what``.
    ``said`` is for who cannot see it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=100)
        canvas = FigureCanvasSVG(figure)
        for place, panel in panels:
            panel(figure.add_axes(place), what)
        file = io.StringIO()
        canvas.print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return for_both_grounds(file.getvalue(), said)


def for_both_grounds(svg: str, said: str) -> str:
    """The drawing without its prolog, in the reader's font, its colours by the ground that the reader prefers."""
    opening, rest = svg[svg.index("<svg") :].split(">", 1)
    opening = re.sub(r'\s(?:width|height|version)="[^"]*"', "", opening)
    rest = re.sub(r"<metadata>.*?</metadata>\s*", "", rest, flags=re.DOTALL)
    rest = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", rest)
    rest = re.sub(r" +$", "", rest, flags=re.MULTILINE)
    for drawn, (name, *_) in COLOURS.items():
        rest = rest.replace(drawn, f"var(--{name})")
    light, dark = ("; ".join(f"--{c[0]}: {c[at]}" for c in COLOURS.values()) for at in (1, 2))
    style = (
        f"<style>svg {{ {light}; font-family: {FONT} }}\n"
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    )
    return f'{opening} width="800" role="img" aria-label="{said}">\n{style}{rest}'


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture; raises ``OSError`` for a demo that is not finished."""
    parser = argparse.ArgumentParser(prog="tools.result_picture", description="Draw README.md's picture of a demo.")
    parser.add_argument("demo", type=Path, help="the folder of a finished `nystrom demo`")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs" / "result.svg")
    args = parser.parse_args(argv)
    args.out.write_text(draw(args.demo / "runs"), encoding="utf-8")


if __name__ == "__main__":
    main()
