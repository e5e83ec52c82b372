"""The results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from benchmarks.attention_ablation.forms import BASELINE, Variant, entries_read
from benchmarks.attention_ablation.study import Record
from benchmarks.attention_ablation.tasks import Task
from benchmarks.common import markdown

Runs = Mapping[str, Mapping[int, Record]]
"""By form and seed."""
Value = Callable[[Record], float | None]

NOTHING = "-"
DIVERGED = "not finite"


def report(task: Task, variants: Sequence[Variant], runs: Runs, timing: Record | None, seq_len: int) -> str:
    """The table of forms, one table for each grouping of targets, and what the figures mean. seq_len: of training."""
    parts = [_forms(task, variants, runs, timing, seq_len), _explain(task, runs, timing)]
    for grouping, labels in task.groupings.items():
        # Results kept from before the task had this grouping are without it.
        known = {
            form: {seed: record for seed, record in own.items() if grouping in record["groups"]}
            for form, own in runs.items()
        }
        if any(known.values()):
            parts.append(_grouped(task, grouping, labels, variants, known))
    return "\n\n".join(parts)


def _forms(task: Task, variants: Sequence[Variant], runs: Runs, timing: Record | None, seq_len: int) -> str:
    other = "accuracy" if task.main == "loss" else "loss"
    far = task.far
    head = ["form", "changes", _title(task.main), f"against {BASELINE}"]
    head += [f"{_title(task.main)}: {far.label}", f"against {BASELINE}"] if far else []
    head += [_title(other), "training loss, mean", "weights", "entries read", "memory, MiB"]
    head += ["ms a step", f"time / {BASELINE}"] if timing else []
    lines = []
    for variant in variants:
        own, baseline = runs.get(variant.name, {}), runs.get(BASELINE, {})
        some = next(iter(own.values()), None)
        cells = [variant.name, variant.describe(), *compared(own, baseline, task.main, overall(task.main))]
        if far:
            cells += compared(own, baseline, task.main, _pooled(task.main, far.grouping, far.bins))
        cells += [
            mean_of(own, other, overall(other)),
            mean_of(own, "loss", lambda record: record["training"]["mean_loss"]),
        ]
        cells += [f"{some['parameters']:,}" if some else NOTHING, f"{entries_read(variant.config, seq_len):.1f}"]
        cells += [f"{some['memory']['bytes'] / 2**20:.1f}" if some else NOTHING]
        if timing:
            step = timing["forms"].get(variant.name)
            cells += [f"{1000 * step['seconds']:.1f}", f"{step['ratio']:.2f}"] if step else [NOTHING] * 2
        lines.append(cells)
    return markdown(head, lines)


def _grouped(task: Task, grouping: str, labels: Sequence[str], variants: Sequence[Variant], runs: Runs) -> str:
    records = [record for own in runs.values() for record in own.values()]
    bins = [i for i in range(len(labels)) if any(record["groups"][grouping][i]["targets"] for record in records)]
    head = [f"{_title(task.main)} by {grouping}", *(labels[i] for i in bins)]
    lines = [
        [
            variant.name,
            *(mean_of(runs.get(variant.name, {}), task.main, _pooled(task.main, grouping, (i,))) for i in bins),
        ]
        for variant in variants
    ]
    if task.main == "accuracy":
        for name, chance in task.chance.items():
            lines.append([f"chance: {name}", *[_format(task.main, chance)] * len(bins)])
    targets = [str(records[0]["groups"][grouping][i]["targets"]) for i in bins] if records else [""] * len(bins)
    return markdown(head, [*lines, ["held-out targets", *targets]])


def _explain(task: Task, runs: Runs, timing: Record | None) -> str:
    records = [record for own in runs.values() for record in own.values()]
    lines = [f"Without recall: {name} {_format(task.main, value)}." for name, value in task.chance.items()]
    seeds = sorted({seed for own in runs.values() for seed in own})
    if len(seeds) > 1:
        lines.append(f"Means over seeds {', '.join(map(str, seeds))}, in brackets largest minus smallest.")
    lines.append(f"'against {BASELINE}' is relative, seed by seed: same initial weights, same batches.")
    lines.append("The training loss is the mean over all steps: lower is learned sooner.")
    lines.append("Entries: the attention's arithmetic in products with one key and one value, a token and layer.")
    if records:
        lines.append(f"Memory: {records[0]['memory']['kind']}.")
    if timing:
        lines.append(f"Times: medians of {timing['rounds']} interleaved rounds of one training step each.")
    return " ".join(lines)


def overall(metric: str) -> Value:
    """That of all targets."""
    return lambda record: record["score"][metric]


def _pooled(metric: str, grouping: str, bins: Sequence[int]) -> Value:
    """Mean over the targets of several bins."""

    def value(record: Record) -> float | None:
        chosen = [record["groups"][grouping][i] for i in bins if record["groups"][grouping][i]["targets"]]
        if not chosen or any(part[metric] is None for part in chosen):
            return None
        return sum(part[metric] * part["targets"] for part in chosen) / sum(part["targets"] for part in chosen)

    return value


def compared(own: Mapping[int, Record], baseline: Mapping[int, Record], metric: str, value: Value) -> list[str]:
    """Two cells: the mean over seeds, and the mean of what it is against the baseline of the same seed, in percent."""
    pairs = [(value(own[seed]), value(baseline[seed])) for seed in sorted(own) if seed in baseline]
    differences = [100 * (a / b - 1) for a, b in pairs if a is not None and b]
    return [mean_of(own, metric, value), _spread(differences, "{:+.2f}%") if differences else NOTHING]


def mean_of(own: Mapping[int, Record], metric: str, value: Value) -> str:
    """The mean over seeds and, in brackets, largest minus smallest."""
    values = [value(own[seed]) for seed in sorted(own)]
    found = [x for x in values if x is not None]
    if len(found) < len(values):
        return DIVERGED
    scale = 100 if metric == "accuracy" else 1
    return _spread([scale * x for x in found], "{:.1f}" if metric == "accuracy" else "{:.4f}") if found else NOTHING


def _spread(values: Sequence[float], form: str) -> str:
    text = form.format(fmean(values))
    return f"{text} ({form.replace('+', '').format(max(values) - min(values))})" if len(values) > 1 else text


def _format(metric: str, value: float) -> str:
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.4f}"


def _title(metric: str) -> str:
    return "accuracy, %" if metric == "accuracy" else "loss, nats"
