"""The pictures of the training: quantities by tokens seen, with the curriculum's stages drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from eval.report.charts import BAND, INK, MUTED, PAPER, colour, dash, picture
from eval.report.numbers import compact, percent
from eval.report.runs import CHECKPOINTS, Run, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBJECTIVES = {"mlm": "masked", "clm": "causal"}
# Records up to which a line goes through all of them.
MOST_RAW = 40
SPREAD = "two standard deviations of single records around it"


def training_charts(runs: Sequence[Run]) -> list[tuple[Markup, str]]:
    """Pictures of the training, each with a caption."""
    everyone = _furthest(runs)
    pictures: list[tuple[Markup | None, str]] = []
    for objective, word in [*OBJECTIVES.items(), ("", "")]:
        group = [(i, run) for i, run in everyone if run.objective == objective]
        title = f"Loss, {word} models" if word else "Loss"
        banded = any(len(run.train) > MOST_RAW for _, run in group)
        line = f"mean of training, shaded: {SPREAD}" if banded else "training"
        pictures.append((loss(group, title), f"{title}. Line: {line}; dots: held-out text."))
    for key, ylabel, title, options in (
        ("tokens_per_second", "tokens per second", "Throughput", {"noisy": True}),
        ("lr", "learning rate", "Learning rate", {}),
        ("grad_norm", "norm before clipping", "Gradient norm, before clipping", {"log": True, "noisy": True}),
        ("data_wait", "share of time", "Time spent waiting for data", {"share": True}),
    ):
        banded = "noisy" in options and any(len(run.train) > MOST_RAW for _, run in everyone)
        caption = f"{title}. Line: mean, shaded: {SPREAD}." if banded else f"{title}."
        pictures.append((over_tokens(everyone, key, ylabel, title, **options), caption))
    return [(drawn, caption) for drawn, caption in pictures if drawn is not None]


def _furthest(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    """Of several checkpoints of one run only the furthest: their curves are the same."""
    kept: dict[str, tuple[int, Run]] = {}
    for index, run in enumerate(runs):
        place = run.path.resolve()
        key = str(place.parent.parent if place.parent.name == CHECKPOINTS else place)
        if key not in kept or run.reached() > kept[key][1].reached():
            kept[key] = (index, run)
    return list(kept.values())


def loss(runs: Sequence[tuple[int, Run]], title: str) -> Markup | None:
    """Training and held-out loss by tokens of runs with one objective, the curriculum's stages behind."""
    if not any(run.train or run.valid for _, run in runs):
        return None

    def draw(axes: Axes) -> None:
        floors: dict[float, list[int]] = {}
        for index, run in runs:
            x, y = columns(run.train, "loss")
            curve(axes, x, y, index)
            x, y = columns(run.valid, "loss")
            axes.plot(x, y, "o", color=colour(index), markersize=6.5, markeredgecolor=PAPER, markeredgewidth=1)
            floor = unigram_floor(run)
            if floor is not None:
                floors.setdefault(round(floor, 2), []).append(index)
        for value, owners in floors.items():
            shade = MUTED if len(floors) == 1 else colour(owners[0])
            axes.axhline(value, color=shade, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(
                "unigram entropy", (1, value), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", color=shade, fontsize=10,
            )  # fmt: skip
        axes.set_ylabel("loss, nats per target")
        stage_bands(axes, runs)

    return picture(draw, title, tokens_axis=True)


def unigram_floor(run: Run) -> float | None:
    """The unigram entropy of the text that the run's curve is of; None where only other text was scored, which is no
    reference for it."""
    own = [r.metrics["unigram_entropy"].value for r in run.of_task("lm") if run.is_own_text(r)
           and "unigram_entropy" in r.metrics]  # fmt: skip
    return max(own, default=None)  # one of earlier versions is of a sample, and too low


def curve(axes: Axes, x: Sequence[float], y: Sequence[float], index: int, *, log: bool = False) -> None:
    """One run's line; from :data:`MOST_RAW` points on a moving mean with a band of two standard deviations around."""
    if len(x) > MOST_RAW:
        found = [math.log(v) if v > 0 else math.nan for v in y] if log else list(y)
        middle = smooth(found)
        spread = [2 * math.sqrt(v) for v in smooth([(a - b) ** 2 for a, b in zip(found, middle, strict=True)])]
        low, high, y = (
            [math.exp(v) if log else v for v in values]
            for values in (
                [m - s for m, s in zip(middle, spread, strict=True)],
                [m + s for m, s in zip(middle, spread, strict=True)],
                middle,
            )
        )
        axes.fill_between(x, low, high, color=colour(index), alpha=0.16, linewidth=0)
    axes.plot(x, y, color=colour(index), linewidth=1.7, linestyle=dash(index))


def over_tokens(
    runs: Sequence[tuple[int, Run]], key: str, ylabel: str, title: str,
    *, log: bool = False, share: bool = False, noisy: bool = False,
) -> Markup | None:  # fmt: skip
    """One quantity of the training records by tokens, for all runs."""
    lines = [(index, *columns(run.train, key)) for index, run in runs]
    if not any(math.isfinite(value) for *_, y in lines for value in y):
        return None

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        for index, x, y in lines:
            if noisy:
                curve(axes, x, y, index, log=log)
            else:
                axes.plot(x, y, color=colour(index), linewidth=1.5, linestyle=dash(index))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(ylabel)
        stage_bands(axes, runs)

    return picture(draw, title, tokens_axis=True, y_format=percent if share else compact)


def columns(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Tokens and the values of ``key`` of the records that have it.

    NaN where it is no finite number, as the loss of a step without targets (null): a gap in the line.
    """
    found = [(float(r["tokens"]), r[key]) for r in records if key in r]
    return [x for x, _ in found], [
        float(y) if isinstance(y, int | float) and math.isfinite(y) else math.nan for _, y in found
    ]


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about 2% of the points, corrected for its start; NaN stays where it is."""
    keep = 1 - 1 / max(len(values) / 50, 1)
    total = weight = 0.0
    result = []
    for value in values:
        if not math.isfinite(value):
            result.append(math.nan)
            continue
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
