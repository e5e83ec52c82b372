"""The evaluation's part of the page: a section for each task, in it a group for each suite."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eval.classification.task import MODEL_ROW, SCRATCH_ROW, TABLE
from eval.report import charts
from eval.report.compare import Difference, Member, doubt
from eval.report.curves import Chart, charts_of
from eval.report.heatmap import Scale, heatmap, scale_of
from eval.report.numbers import title, words
from eval.report.runs import Run
from eval.report.samples import Sample, samples_of
from eval.report.tables import (
    Joined,
    MetricRow,
    attributed,
    difference_rows,
    joined_tables,
    measured,
    metric_rows,
    unequal_conditions,
)
from eval.report.training import OBJECTIVES
from eval.results.schema import Grid
from eval.suites.tasks import TASKS

# The order of the sections, with their headings and what they show. Any other task comes after these.
KNOWN = {
    "lm": ("Language modelling", "How well the model predicts text it has not seen."),
    "context": ("Context", "Whether more context helps: the same held-out tokens after contexts of different lengths."),
    "pppl": ("Pseudo-perplexity", "Masked models: held-out tokens hidden one at a time."),
    "harness": ("lm-eval", "Tasks of EleutherAI's lm-eval harness."),
    "generate": ("Samples", "What the model writes or fills in, with the same statistics of real text beside its own."),
    "classify": (
        "Classification",
        "Fine-tuned on labelled text, beside the same network from random weights and models that know no language.",
    ),
    "needle": ("Needle", "A word or passkey hidden in a long text and asked for at its end, by depth and length."),
    "mqar": ("Associative recall", "Values found again by their keys: what an attention can hold of its past (MQAR)."),
    "induction": (
        "Induction",
        "Whether a passage seen once is continued when it comes again, by the distance between.",
    ),
    "lra": ("Long Range Arena", "Networks trained from nothing on long sequences."),
    "approximation": (
        "Approximation",
        "How far the approximate attention is from exact softmax attention, by layer and head.",
    ),
    "efficiency": ("Efficiency", "Time and memory by length, beside exact attention."),
}

# Letters above a bar that leave room for its value.
MOST_LETTERS = 46


@dataclass(frozen=True)
class HeatMap:
    """One run's grid of a row of them."""

    member: Member
    picture: Markup


@dataclass(frozen=True)
class HeatMaps:
    """The grids of one name, of all runs, on one scale; ``holes``: some cell has no value."""

    title: str
    scale: Scale
    maps: list[HeatMap]
    notes: list[str]
    holes: bool


@dataclass(frozen=True)
class Group:
    """The results of one suite that belong together, of all runs, as the template draws them."""

    heading: str
    lead: str
    members: list[Member]
    unequal: list[str]
    metrics: list[MetricRow]
    differences: list[tuple[str, Difference]]
    bars: Markup | None
    charts: list[Chart]
    heatmaps: list[HeatMaps]
    tables: list[Joined]
    samples: list[Sample]
    measured: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Section:
    """A task."""

    id: str
    title: str
    lead: str
    groups: list[Group]


def sections(runs: Sequence[Run]) -> list[Section]:
    """All tasks but the validity gate, which stands first on the page by itself."""
    found = list(dict.fromkeys(r.task for run in runs for r in run.results.values() if r.task != "validity"))
    order = [*KNOWN, *(name for name in TASKS if name not in KNOWN)]
    found.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    numbers = itertools.count(1)
    parts = []
    for place, task in enumerate(found, 1):
        heading, lead = heading_of(task)
        groups = [_group(members, label, next(numbers), heading) for label, members in _groups(runs, task)]
        parts.append(Section(f"task-{place}-{re.sub(r'[^a-z0-9]+', '-', task.lower())}", heading, lead, groups))
    return parts


def heading_of(task: str) -> tuple[str, str]:
    """A task's heading, and one sentence on it."""
    if task in KNOWN:
        return KNOWN[task]
    summary = TASKS[task].summary if task in TASKS else ""
    return title(
        task
    ), f"{summary[:1].upper()}{summary[1:]}{'' if summary.endswith(('.', '?', '!')) else '.'}" if summary else ""


def members_of(runs: Sequence[Run], task: str, suite: str) -> list[Member]:
    """The runs' results of one suite."""
    return [
        Member(index, run, result, doubt(run, result))
        for index, run in enumerate(runs)
        for name, result in run.results.items()
        if result.task == task and name == suite
    ]


def _groups(runs: Sequence[Run], task: str) -> Iterator[tuple[str, list[Member]]]:
    """A group for each suite, and for each objective where those measure different things."""
    suites = dict.fromkeys(name for run in runs for name, result in run.results.items() if result.task == task)
    for suite in sorted(suites, key=lambda name: (name != task, name)):
        parts: list[list[Member]] = []
        for member in members_of(runs, task, suite):
            part = next((p for p in parts if _alike(p[0], member)), None)
            if part is None:
                parts.append([member])
            else:
                part.append(member)
        label = suite if len(suites) > 1 or suite != task else ""
        for part in parts:
            kinds = dict.fromkeys(OBJECTIVES.get(m.result.model.objective, "") for m in part)
            kind = f"{' and '.join(k for k in kinds if k)} models" if len(parts) > 1 and any(kinds) else ""
            yield f"{label}, {kind}" if label and kind else label or kind[:1].upper() + kind[1:], part


def _alike(first: Member, second: Member) -> bool:
    """Whether two results are of one objective, or have at least half of their metrics in common."""
    if first.result.model.objective == second.result.model.objective:
        return True
    a, b = first.result.metrics.keys(), second.result.metrics.keys()
    return len(a & b) * 2 >= len(a | b)


def _group(members: list[Member], label: str, number: int, heading: str) -> Group:
    context = f"{heading} {number}" + (f", {label}" if label else "")
    classified = [member for member in members if member.result.table(TABLE)]
    bars = _bars(classified, context) if members[0].result.task == "classify" and classified else None
    return Group(
        heading=label,
        lead=_lead(members),
        members=members,
        unequal=unequal_conditions(members),
        metrics=metric_rows(members),
        differences=difference_rows(members),
        bars=bars,
        charts=charts_of(members, context),
        heatmaps=_heatmaps(members),
        tables=joined_tables(members),
        samples=samples_of(members),
        measured=measured(members),
    )


def _lead(members: Sequence[Member]) -> str:
    """On what all of them were measured, where the data has a path or files and all have the same."""
    data = members[0].result.data
    if any(member.result.data != data for member in members):
        return ""
    names = ("path", "train", "test", "source")
    paths = [f"{words(key)} {data[key]}" if key != "path" else str(data[key]) for key in names if data.get(key)]
    counts = [
        f"{value:,} {words(key)}"
        for key, value in data.items()
        if isinstance(value, int) and not isinstance(value, bool) and value
    ]
    counts += [f"{len(value)} {words(key)}" for key, value in data.items() if isinstance(value, list) and value]
    return "; ".join(filter(None, (", ".join(paths), ", ".join(counts))))


def _heatmaps(members: Sequence[Member]) -> list[HeatMaps]:
    groups: dict[tuple[str, str, str], list[tuple[Member, Grid]]] = {}
    for member in members:
        for grid in member.result.grids:
            groups.setdefault((grid.name, grid.xlabel, grid.ylabel), []).append((member, grid))
    rows = []
    for (name, *_), found in groups.items():
        scale = scale_of([grid for _, grid in found])
        maps = [HeatMap(m, heatmap(grid, scale, f"{name}, {m.run.name}")) for m, grid in found]
        notes = attributed([(m, grid.note) for m, grid in found])
        holes = any(value is None for _, grid in found for row in grid.values for value in row)
        rows.append(HeatMaps(name, scale, maps, notes, holes))
    return rows


def _bars(members: Sequence[Member], context: str) -> Markup | None:
    """Accuracies, the controls once: they do not depend on the run unless texts were cut differently."""
    bars: list[tuple[str, float, float | None, int | None]] = []
    controls: dict[str, tuple[float, float | None]] = {}
    for member in members:
        table = member.result.table(TABLE)
        assert table is not None  # only such members are given
        mark = ", GATE FAILED" if member.doubt else ""
        for row in table.rows:
            name, accuracy, std = row[:3]
            if not isinstance(name, str) or not isinstance(accuracy, int | float):
                continue
            std = std if isinstance(std, int | float) else None
            if name == MODEL_ROW:
                bars.append((_label(member.run.name, f", pretrained{mark}"), accuracy, std, member.index))
            elif name == SCRATCH_ROW:
                bars.append((_label(member.run.name, ", from scratch"), accuracy, std, None))
            else:
                controls.setdefault(name, (accuracy, std))
    bars += [(name, *found, None) for name, found in sorted(controls.items(), key=lambda pair: -pair[1][0])]
    return charts.bars(bars, f"{context}: accuracy")


def _label(name: str, what: str) -> str:
    """What stands above a bar: the name cut to the room that is left for it."""
    room = MOST_LETTERS - len(what)
    return (name if len(name) <= room else f"{name[: room - 1]}…") + what
