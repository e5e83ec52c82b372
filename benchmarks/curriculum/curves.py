"""From a run's metrics and the time of its steps to a curve, and from two curves to an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import markdown

Point = dict[str, float]
RUNS = {"curriculum": "curriculum of lengths", "fixed": "longest length throughout"}


def curve(metrics: Path, times: list[float]) -> list[Point]:
    """Held-out loss at the longest length after each validation: {tokens, seconds, loss}.

    ``times`` are the seconds of each step, with what the trainer did between the step before and this one. The
    validations' own time, which is in the metrics, is taken off.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [*times, 0.0]  # the last validation has no step behind it
    valid = [line for line in lines if line["kind"] == "valid"]
    for line in valid:
        seconds[line["step"]] -= line["took"]
    points = []
    for line in valid:
        loss = line.get("longest_loss", line["loss"])
        if loss is None:  # not finite, or without a target: no point of the curve
            continue
        points.append({"tokens": line["tokens"], "seconds": sum(seconds[: line["step"]]), "loss": loss})
    return points


def reached(points: list[Point], loss: float) -> float | None:
    """Seconds at which the curve, straight between its points, first comes down to ``loss``; None if it never does."""
    before: Point | None = None
    for point in points:
        if point["loss"] <= loss:
            if before is None:
                return point["seconds"]
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


def summary(curves: dict[str, list[Point]]) -> dict[str, Any]:
    """Final losses, times, and the time that the curriculum takes to the fixed run's final loss, as a ratio."""
    fixed, ours = curves["fixed"][-1], curves["curriculum"][-1]
    at = reached(curves["curriculum"], fixed["loss"])
    return {
        "fixed_loss": fixed["loss"],
        "fixed_seconds": fixed["seconds"],
        "curriculum_loss": ours["loss"],
        "curriculum_seconds": ours["seconds"],
        "seconds_to_fixed_loss": at,
        "ratio": None if at is None else at / fixed["seconds"],
    }


def report(pairs: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        [
            str(pair["seed"]),
            f"{pair['fixed_loss']:.4f}",
            f"{pair['fixed_seconds']:.0f}",
            f"{pair['curriculum_loss']:.4f}",
            f"{pair['curriculum_seconds']:.0f}",
            "never" if pair["ratio"] is None else f"{pair['seconds_to_fixed_loss']:.0f}",
            "" if pair["ratio"] is None else f"{pair['ratio']:.3f}",
        ]
        for pair in pairs
    ]
    head = ["seed", "fixed: loss", "s", "curriculum: loss", "s", "s to the fixed run's loss", "of its time"]
    return markdown(head, lines)


def draw(pairs: list[dict[str, Any]], path: Path) -> None:
    """Loss by seconds of training; one line for each run, one colour for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.0))
    for (name, title), colour in zip(RUNS.items(), ("#1a7f5a", "#b4552d"), strict=True):
        for number, pair in enumerate(pairs):
            points = pair["curves"][name]
            label = title if number == 0 else None
            x, y = [point["seconds"] for point in points], [point["loss"] for point in points]
            axes.plot(x, y, color=colour, label=label, marker="o", markersize=3, linewidth=1.5)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("held-out loss at the longest length, nats a token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
