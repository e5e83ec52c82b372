"""The evaluation's part of the page: a section for each task, in it a group for each suite."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eval.report import charts
from eval.report.compare import Difference, Member, doubt
from eval.report.curves import Chart, charts_of
from eval.report.heatmap import Scale, heatmap, scale_of
from eval.report.material import lead_of
from eval.report.numbers import title
from eval.report.runs import Run
from eval.report.samples import Sample, kinds_of, samples_of
from eval.report.tables import (
    Joined,
    MetricRow,
    attributed,
    difference_rows,
    joined_tables,
    measured,
    metric_rows,
    unequal_sentence,
)
from eval.report.training import OBJECTIVES
from eval.results.caution import few_items
from eval.results.schema import Grid
from eval.task import Bars, described

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
    cautions: list[str]
    members: list[Member]
    unequal: str
    metrics: list[MetricRow]
    differences: list[tuple[str, Difference]]
    bars: Markup | None
    bars_of: str
    charts: list[Chart]
    heatmaps: list[HeatMaps]
    tables: list[Joined]
    samples: list[Sample]
    kinds: set[str]
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
    found = list(dict.fromkeys(r.task for run in runs for r in run.results.values() if not described(r.task).is_gate))
    found.sort(key=lambda name: (_place(name), name))
    numbers = itertools.count(1)
    parts = []
    for place, task in enumerate(found, 1):
        heading, lead = heading_of(task)
        groups = [_group(members, label, next(numbers), heading) for label, members in _groups(runs, task)]
        parts.append(Section(f"task-{place}-{re.sub(r'[^a-z0-9]+', '-', task.lower())}", heading, lead, groups))
    return parts


def heading_of(task: str) -> tuple[str, str]:
    """A task's heading, and one sentence on it."""
    about = described(task)
    summary = about.summary[:1].upper() + about.summary[1:]
    full_stop = "." if summary and not summary.endswith((".", "?", "!")) else ""
    return about.heading or title(task), about.lead or summary + full_stop


def _place(task: str) -> int:
    about = described(task)
    return about.order if about.section is None else about.section


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
    drawn = described(members[0].result.task).bars
    samples = samples_of(members)
    return Group(
        heading=label,
        lead=lead_of(members),
        cautions=attributed([(m, caution) for m in members if (caution := few_items(m.result))]),
        members=members,
        unequal=unequal_sentence(members),
        metrics=metric_rows(members),
        differences=difference_rows(members),
        bars=_bars(members, drawn, context) if drawn else None,
        bars_of=_capital(drawn.value) if drawn else "",
        charts=charts_of(members, context),
        heatmaps=_heatmaps(members),
        tables=joined_tables(members),
        samples=samples,
        kinds=kinds_of(samples),
        measured=measured(members),
    )


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


def _bars(members: Sequence[Member], drawn: Bars, context: str) -> Markup | None:
    """The values of each run, and the other rows once: they do not depend on the run unless texts were cut differently.

    None where no member has the table.
    """
    tables = [(member, table) for member in members if (table := member.result.table(drawn.table))]
    bars: list[tuple[str, float, float | None, int | None]] = []
    others: dict[str, tuple[float, float | None]] = {}
    for member, table in tables:
        mark = ", GATE FAILED" if member.doubt else ""
        for row in table.rows:
            name, value, std = row[:3]
            if not isinstance(name, str) or not isinstance(value, int | float):
                continue
            std = std if isinstance(std, int | float) else None
            if name == drawn.model:
                bars.append((_label(member.run.name, f", {drawn.model_label}{mark}"), value, std, member.index))
            elif name == drawn.control:
                bars.append((_label(member.run.name, f", {drawn.control_label}"), value, std, None))
            elif name not in drawn.left_out:
                others.setdefault(name, (value, std))
    bars += [(name, *found, None) for name, found in sorted(others.items(), key=lambda pair: -pair[1][0])]
    return charts.bars(bars, f"{context}: {drawn.value}", f"{drawn.value} on the test file") if tables else None


def _capital(value: str) -> str:
    """The name of a figure at the beginning of a sentence; one with capitals of its own (nDCG) as it is."""
    return title(value) if value.islower() else value


def _label(name: str, what: str) -> str:
    """What stands above a bar: the name cut to the letters that are left for it."""
    most = MOST_LETTERS - len(what)
    return (name if len(name) <= most else f"{name[: most - 1]}…") + what
