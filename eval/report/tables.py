"""The tables of a group of results: its metrics, its own tables joined over runs, what differs, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eval.report.compare import Difference, Member, best_of, differences
from eval.report.numbers import number, plain, words
from eval.report.runs import flatten
from eval.results.comparable import same_unit, unequal
from eval.results.schema import Metric, Result

# Rows beyond which a table is folded, and beyond which the rest is left to the file.
FOLD_ROWS, MOST_ROWS = 16, 400
# Metrics and differences that stand open.
MOST_METRICS = 14
# What n may count in a result of an earlier version, which did not say.
UNITS = {"tokens", "bytes", "words", "targets"}
# What a text is, and no score: earlier versions wrote that lower is better.
FACTS = {"unigram_entropy", "share_of_texts_cut"}


@dataclass(frozen=True)
class Figure:
    """One metric of one run: its value as text, the deviation over seeds, the interval; ``best`` of the runs.

    ``full``: the number whole where the text abbreviates it. ``notes``: what else must be known of it, in a few words.
    """

    text: str = "–"
    std: str = ""
    span: str = ""
    best: bool = False
    doubt: str = ""
    outdated: str = ""
    full: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MetricRow:
    """One metric of all runs; ``hint`` says which way is better, ``n`` what it is over: "1,024 tokens", "3 seeds"."""

    label: str
    hint: str
    figures: list[Figure]
    n: str = ""


@dataclass
class Joined:
    """The rows of several runs under the same columns. ``rows``: the member, and its cells."""

    title: str
    columns: list[str]
    rows: list[tuple[Member, list[Any]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold nothing but numbers."""
        kinds = (int, float, type(None))
        return [all(isinstance(row[i], kinds) for _, row in self.rows) for i in range(len(self.columns))]

    @property
    def folded(self) -> bool:
        """Whether it is too long to stand open."""
        return len(self.rows) > FOLD_ROWS

    @property
    def shown(self) -> list[tuple[Member, list[Any]]]:
        """The rows that go into the page."""
        return self.rows[:MOST_ROWS]


def figure(metric: Metric | None, *, best: bool = False, doubt: str = "") -> Figure:
    """A metric as the page writes it; a dash where there is none."""
    if metric is None:
        return Figure()
    bounded = metric.low is not None and metric.high is not None
    text = number(float(metric.value))
    return Figure(
        text,
        _like(text, float(metric.std)) if metric.std is not None else "",
        f"[{number(float(metric.low or 0))}, {number(float(metric.high or 0))}]" if bounded else "",
        best,
        doubt,
    )


def _like(text: str, std: float) -> str:
    """A deviation with the decimals of its value ``text``; by itself where it would be 0 then."""
    _, point, decimals = text.partition(".")
    shown = f"{std:.{len(decimals)}f}" if point and decimals.isdigit() else ""
    return shown if shown.strip("0.") else number(std)


def direction(metric: Metric) -> str:
    """Which way is better, in words."""
    return {True: "higher is better", False: "lower is better", None: ""}[metric.higher_is_better]


def over(result: Result, name: str) -> str:
    """What a metric is of, as "1,024 tokens"; without a unit where a result of an earlier version does not say."""
    metric = result.metrics[name]
    if metric.n is None:
        return ""
    unit = metric.unit or ("seeds" if metric.std is not None else "")
    if not unit and name in result.estimators:
        counted = (result.estimators[name].denominator or "items").removesuffix("_clean")
        unit = "items" if metric.n == result.records.get("count") else counted if counted in UNITS else ""
    return f"{number(metric.n)} {unit.removesuffix('s') if metric.n == 1 else unit}".rstrip()


def metric_row(label: str, members: Sequence[Member | None], name: str, *, ranked: bool = True) -> MetricRow:
    """One metric over the runs; the best marked if they are comparable (``ranked``: and should be) and not in doubt."""
    ranked = ranked and name not in FACTS
    found = [member.result.metrics.get(name) if member else None for member in members]
    present = [member for member, metric in zip(members, found, strict=True) if member and metric]
    first = next(metric for metric in found if metric)
    winner = None
    own_tokens = not same_unit(name, [member.result for member in present])
    if ranked and not own_tokens and not unequal(sound(present)):
        winner = best_of([m if member and not member.doubt else None for m, member in zip(found, members, strict=True)])
    figures = [
        replace(
            figure(metric, best=place == winner, doubt=member.doubt if member and metric else ""),
            outdated=member.outdated if member and metric else "",
        )
        for place, (metric, member) in enumerate(zip(found, members, strict=True))
    ]
    counts = list(dict.fromkeys(over(member.result, name) for member in present))
    hint = "by token, and tokenizers differ" if own_tokens else direction(first)
    return MetricRow(label, hint if ranked else "", figures, " / ".join(counts))


def metric_rows(members: Sequence[Member]) -> list[MetricRow]:
    """Every metric of the results."""
    names = dict.fromkeys(name for member in members for name in member.result.metrics)
    return [metric_row(words(name), members, name) for name in names]


def joined_tables(members: Sequence[Member]) -> list[Joined]:
    """Tables of one name and the same columns as one; the runs' notes below it."""
    tables: dict[tuple[str, tuple[str, ...]], Joined] = {}
    notes: dict[tuple[str, tuple[str, ...]], list[tuple[Member, str]]] = {}
    for member in members:
        for table in member.result.tables:
            columns = [str(column) for column in table.columns]
            joined = tables.setdefault((table.name, tuple(columns)), Joined(table.name, columns))
            joined.rows += [(member, row) for row in table.rows]
            notes.setdefault((table.name, tuple(columns)), []).append((member, table.note))
    for key, joined in tables.items():
        joined.notes = attributed(notes[key])
    return [joined for joined in tables.values() if joined.rows]


def attributed(notes: Sequence[tuple[Member, str]]) -> list[str]:
    """Each note once: as it is if all runs say it, else behind the names of those that do."""
    sayers: dict[str, list[Member]] = {}
    for member, note in notes:
        sayers.setdefault(note, []).append(member)
    runs = {member.index for member, _ in notes}
    said = []
    for note, members in sayers.items():
        names = ", ".join(dict.fromkeys(member.run.name for member in members))
        if note:
            said.append(note if {member.index for member in members} == runs else f"{names}: {note}")
    return said


def difference_rows(members: Sequence[Member]) -> list[tuple[str, Difference]]:
    """The paired differences, with the metric's name in words; figures in doubt take no part."""
    certain = [member for member in members if not member.doubt]
    return [(words(row.metric), row) for row in differences(certain)] if certain else []


def unequal_sentence(members: Sequence[Member]) -> str:
    """In what the members that are not in doubt differ so that they are not comparable, as text; "" if they are."""
    found = unequal(sound(members))
    kinds = [words(key) for key in found if not key.startswith("setting ")]
    settings = [key.removeprefix("setting ") for key in found if key.startswith("setting ")]
    parts = [f"the {kind}" for kind in kinds]
    if settings:
        parts.append(f"the setting{'s' if len(settings) > 1 else ''} {listed(settings)}")
    return listed(parts)


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def sound(members: Sequence[Member]) -> list[Result]:
    """The results that are not in doubt: the others take no part in any comparison."""
    return [member.result for member in members if not member.doubt]


def measured(members: Sequence[Member]) -> list[tuple[str, list[str]]]:
    """The settings and the data of every member, and when and at what cost they were scored."""
    return side_by_side(
        [
            {f"setting: {k}": v for k, v in flatten(m.result.settings).items()}
            | {f"data: {k}": v for k, v in flatten(m.result.data).items()}
            | {
                "weights": m.result.model.weights_hash[:12] or "none: the suite trains its own models",
                "validity gate": {"none": "not asked"}.get(m.result.gate, m.result.gate),
                "scored items": number(m.result.records.get("count")),
                "computed": m.result.created,
                "seconds": number(m.result.seconds),
                "file": f"{m.result.suite}.json",
            }
            for m in members
        ]
    )


def config_differences(configs: Sequence[dict[str, Any]], skip: set[str]) -> list[tuple[str, list[str]]]:
    """Keys on which the configurations differ, with each one's value."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in skip)
    rows = [(key, [plain(config.get(key)) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def side_by_side(columns: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Every key, with each column's value."""
    keys = dict.fromkeys(key for values in columns for key in values)
    return [(key, [plain(values.get(key)) for values in columns]) for key in keys]
