"""The head of the page: whether the figures may be believed, and the few that say most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.compare import checks_table, failed_checks, gate_result
from eval.report.numbers import compact, number, words
from eval.report.runs import Run
from eval.report.sections import heading_of, members_of
from eval.report.tables import Figure, MetricRow, metric_row
from eval.report.training import OBJECTIVES
from eval.results.schema import Table
from eval.task import described, tasks

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
    return Banner(run.name, "passed", f"all {len(table.rows)} validity checks passed", table)


def summary(runs: Sequence[Run]) -> list[MetricRow]:
    """Rows of the first table: what the runs are, and their most telling figures."""
    rows = []
    for label, texts in (
        ("Objective", [OBJECTIVES.get(_objective(run), "–") for run in runs]),
        ("Attention", [_attention(run) for run in runs]),
        ("Parameters", [_of_model(run, "parameters") for run in runs]),
        ("Tokens seen", [compact(run.reached()) if run.reached() else _of_model(run, "tokens") for run in runs]),
        ("Training time", [_duration(run) for run in runs]),
        ("Last held-out loss while training", [number(_last(run.valid, "loss")) for run in runs]),
    ):
        if any(text != "–" for text in texts):
            rows.append(MetricRow(label, "", [Figure(text) for text in texts]))
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
                row = _row(runs, task, name, shown.metric, label, ranked=shown.ranked)
                rows += [row] if row else []
    others = 0
    for task, name in suites:
        if described(task).rows or others == MOST_OTHERS:
            continue
        metrics = dict.fromkeys(m for member in members_of(runs, task, name) for m in member.result.metrics)
        heading = heading_of(task)[0]
        for metric in list(metrics)[:1]:
            suite = "" if name == task else f" ({name})"
            row = _row(runs, task, name, metric, f"{heading}, {words(metric)}{suite}")
            rows += [row] if row else []
            others += 1
    return rows


def _row(
    runs: Sequence[Run], task: str, suite: str, metric: str, label: str, *, ranked: bool = True
) -> MetricRow | None:
    by_run = {member.index: member for member in members_of(runs, task, suite)}
    members = [by_run.get(index) for index in range(len(runs))]
    if not any(metric in member.result.metrics for member in members if member):
        return None
    return metric_row(label, members, metric, ranked=ranked)


def _objective(run: Run) -> str:
    return run.objective or next((r.model.objective for r in run.results.values() if r.model.objective), "")


def _attention(run: Run) -> str:
    named = next((r.model.attention for r in run.results.values() if r.model.attention), None)
    return str(run.setting("model", "attention") or named or "–")


def _of_model(run: Run, name: str) -> str:
    return next((f"{getattr(r.model, name):,}" for r in run.results.values() if r.model.weights_hash), "–")


def _last(records: Sequence[dict[str, Any]], key: str) -> Any:
    return records[-1].get(key) if records else None


def _duration(run: Run) -> str:
    seconds = _last(run.train, "seconds")
    if not isinstance(seconds, int | float):
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
