"""The head of the page: whether the figures may be believed, and the few that say most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.report.compare import checks_table, failed_checks, gate_result
from eval.report.material import source_of
from eval.report.numbers import compact, number, words
from eval.report.runs import Run
from eval.report.sections import heading_of, members_of
from eval.report.tables import Figure, MetricRow, metric_row
from eval.report.training import OBJECTIVES
from eval.results.caution import few_items
from eval.results.schema import Result, Table
from eval.task import Row, described, tasks
from pretrain.model.attention import pattern

# Suites of tasks without rows of their own show their first metric, so many of them at most.
MOST_OTHERS = 8


@dataclass(frozen=True)
class Banner:
    """What the validity gate said of a run; ``state``: "passed", "failed" or "unknown"."""

    run: str
    state: str
    text: str
    table: Table | None = None


def banner(run: Run) -> Banner | None:
    """None for a folder of results that has nothing to do with a checkpoint."""
    scored = {name: result for name, result in run.results.items() if not described(result.task).is_gate}
    forced = [name for name, result in scored.items() if result.gate == "forced"]
    checked_by, table = gate_result(run), checks_table(run)
    failed = failed_checks(run)
    if failed or forced:
        parts = [f"failed: {'; '.join(failed)}."] if failed else ["failed when it was asked for these scores."]
        if forced:
            parts.append(f"Scored all the same, by --force: {', '.join(forced)}. These figures prove nothing.")
        return Banner(run.name, "failed", " ".join(parts), table)
    if checked_by is None or table is None:
        gates = {result.gate for result in scored.values()} - {"none"}
        if not run.trained and not gates:
            return None
        if gates == {"passed"}:
            return Banner(run.name, "passed", "the validity gate had passed when these scores were computed")
        return Banner(run.name, "unknown", "validity not checked")
    checked = checked_by.model.identity
    if any(result.model.weights_hash and result.model.identity != checked for result in scored.values()):
        return Banner(run.name, "unknown", "checked on another model than the one scored below", table)
    outdated = run.outdated(checked_by)
    text = f"all {len(table.rows)} validity checks passed"
    if outdated:
        return Banner(run.name, "unknown", f"{text} on earlier weights: {outdated.replace('scored', 'checked')}", table)
    return Banner(run.name, "passed", text, table)


def facts(runs: Sequence[Run]) -> list[MetricRow]:
    """Rows of the first table: what the runs are."""
    rows = []
    for label, hint, figures in (
        ("Objective", "", [Figure(OBJECTIVES.get(_objective(run), "–")) for run in runs]),
        ("Attention", "", [Figure(_attention(run)) for run in runs]),
        ("Parameters", "", [_of_model(run, "parameters") for run in runs]),
        ("Tokens seen", "", [_amount(run.reached()) if run.reached() else _of_model(run, "tokens") for run in runs]),
        ("Training time", "", [Figure(_duration(run)) for run in runs]),
        (
            "Last held-out loss while training",
            _held_out(runs),
            [Figure(number(_last(run.valid, "loss"))) for run in runs],
        ),
    ):
        if any(figure.text != "–" for figure in figures):
            rows.append(MetricRow(label, hint, figures))
    return rows


def scores(runs: Sequence[Run]) -> list[MetricRow]:
    """Rows of the second table: the most telling figures of the evaluation."""
    rows: list[MetricRow] = []
    suites = dict.fromkeys(
        (r.task, name) for run in runs for name, r in run.results.items() if not described(r.task).is_gate
    )  # fmt: skip
    for task, about in tasks().items():
        # Where the plain suite was run, its variants are left to their section.
        plain = (task, task) in suites and about.variants
        names = [task] if plain else sorted(name for t, name in suites if t == task)
        for shown in about.rows:
            for name in names:
                label = shown.label if name == task else f"{shown.label} ({name})"
                row = _row(runs, task, name, replace(shown, label=label))
                rows += [row] if row else []
    others = 0
    for task, name in suites:
        if described(task).rows or others == MOST_OTHERS:
            continue
        metrics = dict.fromkeys(m for member in members_of(runs, task, name) for m in member.result.metrics)
        heading = heading_of(task)[0]
        for metric in list(metrics)[:1]:
            suite = "" if name == task else f" ({name})"
            row = _row(runs, task, name, Row(metric, f"{heading}, {words(metric)}{suite}"))
            rows += [row] if row else []
            others += 1
    return rows


def _row(runs: Sequence[Run], task: str, suite: str, shown: Row) -> MetricRow | None:
    by_run = {member.index: member for member in members_of(runs, task, suite)}
    members = [by_run.get(index) for index in range(len(runs))]
    present = [member for member in members if member and shown.metric in member.result.metrics]
    if not present:
        return None
    row = metric_row(shown.label, members, shown.metric, ranked=shown.ranked)
    texts = {source_of(member.result) for member in present}
    own = all(member.run.is_own_text(member.result) or "train" in member.result.data for member in present)
    everywhere = "".join(texts) if len(texts) == 1 and not own else ""
    figures = []
    for figure, member in zip(row.figures, members, strict=True):
        if member is None or shown.metric not in member.result.metrics:
            figures.append(figure)
            continue
        source = source_of(member.result) if len(texts) > 1 else ""
        where = f"on {source}" if source else ""
        few = "few items" if few_items(member.result) else ""
        notes = tuple(filter(None, (where, not_better(member.result, shown), few)))
        figures.append(replace(figure, notes=notes))
    hint = ", ".join(filter(None, (row.hint, f"on {everywhere}" if everywhere else "")))
    return replace(row, hint=hint, figures=figures)


def not_better(result: Result, shown: Row) -> str:
    """That a figure is not better than its row's reference, in words; "" where it is, or where one is missing."""
    mine, other = result.metrics.get(shown.metric), result.metrics.get(shown.reference)
    if mine is None or other is None or mine.higher_is_better is None:
        return ""
    better = mine.value > other.value if mine.higher_is_better else mine.value < other.value
    name = words(shown.reference)
    return "" if better else f"not better than {name.removesuffix(' accuracy')}, {number(other.value)}"


def _held_out(runs: Sequence[Run]) -> str:
    """The text that the loss while training is of, where it is the same for all runs that have one."""
    named = {str(run.setting("data", "valid") or "") for run in runs if run.valid}
    found = named.pop() if len(named) == 1 else ""
    return f"on {found}" if found else ""


def _objective(run: Run) -> str:
    return run.objective or next((r.model.objective for r in run.results.values() if r.model.objective), "")


def _attention(run: Run) -> str:
    named = next((r.model.attention for r in run.results.values() if r.model.attention), None)
    given, layers = run.setting("model", "attention"), run.setting("model", "num_layers")
    if isinstance(given, list):  # a pattern by layer
        return named or (pattern.label(given, layers) if layers else pattern.written(given))
    return str(given or named or "–")


def _of_model(run: Run, name: str) -> Figure:
    return next((_amount(getattr(r.model, name)) for r in run.results.values() if r.model.weights_hash), Figure())


def _amount(value: float) -> Figure:
    return Figure(compact(value), full=f"{value:,.0f}")


def _last(records: Sequence[dict[str, Any]], key: str) -> Any:
    """The last value that there is: a step without targets has a null loss."""
    return next((r[key] for r in reversed(records) if r.get(key) is not None), None)


def _duration(run: Run) -> str:
    seconds = _last(run.train, "seconds")
    if not isinstance(seconds, int | float):
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
