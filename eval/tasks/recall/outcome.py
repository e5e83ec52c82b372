"""Items of a recall task as metrics, records, tables, curves and heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.results.schema import Estimator, Grid, Metric, Outcome, Series, Table
from eval.results.statistics import Interval, bootstrap, estimate, paired_bootstrap
from eval.shared.forms import OWN
from eval.tasks.recall.questions import Kind
from eval.tasks.recall.study import AS_IS, TRAINED, Study, Variant

TABLE = "recall"
FEW = 12
"""Up to so many different distances have a point of their own in the curves; more are gathered by powers of two."""
HIGHER = {"accuracy": True, "calibrated": True, "exact": True, "gain": True, "gain_other": True, "nats": False}
SUMS = {"accuracy": "right", "calibrated": "calibrated", "exact": "exact", "gain": "gain", "gain_other": "gain_other",
        "nats": "nats"}  # fmt: skip
"""Metric -> what of an item it is the mean of, over questions."""


@dataclass(frozen=True)
class View:
    """How a task's outcome is presented. ``window``: tokens that the model's own form sees exactly, or None."""

    title: str
    kind: Kind
    window: int | None
    note: str


def outcome(study: Study, view: View) -> Outcome:
    """Everything that the result holds. The metrics are those of the form that the checkpoint was trained with."""
    records = _records(study, view)
    estimators = _estimators(records)
    metrics = {}
    for name, estimator in estimators.items():
        found = bootstrap(records, estimator)
        better = HIGHER[name.removeprefix("trained_").removesuffix("_beyond_window")]
        metrics[name] = Metric(found.value, better, n=found.n, low=found.low, high=found.high, unit="rows")
    seeds = list(study.by_seed.get(OWN, {}).values())
    main = "trained_accuracy" if "trained_accuracy" in metrics else "trained_exact"
    if len(seeds) > 1:
        metrics["trained_std_over_seeds"] = Metric(float(np.std(seeds, ddof=1)), None, n=len(seeds), unit="seeds")
    if "accuracy" in metrics:
        metrics["chance"] = Metric(_chance(_flat(study.items[Variant(AS_IS, OWN)])), None)
    tables = [_table(study, view)]
    if study.by_seed:
        tables.append(_seeds(study, main.removeprefix("trained_")))
    return Outcome(metrics, tables, _series(study, view), _grids(study, view), study.samples, records, estimators)


def _records(study: Study, view: View) -> list[dict[str, Any]]:
    """One for each row: sums over its questions, those beyond the window, and the same after training."""
    own, trained = study.items[Variant(AS_IS, OWN)], study.items.get(Variant(TRAINED, OWN))
    records = []
    for number, (cell, rows) in enumerate(zip(view.kind.cells, own, strict=True)):
        for place, item in enumerate(rows):
            distance = np.array(item["distance"])
            record: dict[str, Any] = {"id": item["id"], "length": cell.length, **cell.facts}
            record |= {"distance": float(distance.mean()), "questions": len(distance)}
            beyond = distance >= view.window if view.window is not None else None
            if beyond is not None:
                record["questions_beyond_window"] = int(beyond.sum())
            versions = [("", item)] + ([("trained_", trained[number][place])] if trained else [])
            for prefix, values in versions:
                for name, key in SUMS.items():
                    if key not in values or (prefix and name == "nats"):
                        continue
                    record[prefix + name] = float(np.sum(values[key]))
                    if beyond is not None and name in ("accuracy", "exact", "gain"):
                        record[f"{prefix}{name}_beyond_window"] = float(np.sum(np.array(values[key])[beyond]))
            records.append(record)
    return records


def _estimators(records: Sequence[dict[str, Any]]) -> dict[str, Estimator]:
    """Means over questions: sums of the records over their numbers of questions."""
    names = [f"{p}{name}{s}" for p in ("", "trained_") for name in SUMS for s in ("", "_beyond_window")]
    found = {}
    for name in names:
        count = "questions_beyond_window" if name.endswith("_beyond_window") else "questions"
        if name in records[0] and sum(record[count] for record in records):
            found[name] = Estimator(name, count)
    return found


def _sums(items: Iterable[dict[str, Any]], key: str, keep: Any = None) -> list[dict[str, Any]]:
    """For each row the sum of ``key`` over its questions, or over those whose distance ``keep`` accepts; a row without
    any is left out."""
    found = []
    for item in items:
        kept = [v for v, d in zip(item[key], item["distance"], strict=True) if keep is None or keep(d)]
        if kept:
            found.append({"id": item["id"], "sum": float(np.sum(kept)), "count": len(kept)})
    return found


_MEAN = Estimator("sum", "count")


def _chance(items: Iterable[dict[str, Any]], keep: Any = None) -> float:
    """Accuracy of choosing blindly, mean over the questions."""
    return estimate(_sums(items, "chance", keep), _MEAN)


def _interval(items: Iterable[dict[str, Any]], key: str, keep: Any = None) -> Interval | None:
    rows = _sums(items, key, keep)
    return bootstrap(rows, _MEAN) if rows else None


def _flat(cells: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [item for cell in cells for item in cell]


def _keys(study: Study) -> list[str]:
    items = study.items[Variant(AS_IS, OWN)][0][0]
    return [name for name, key in SUMS.items() if key in items and name != "nats"]


LABELS = {
    "accuracy": "accuracy",
    "calibrated": "accuracy, calibrated",
    "exact": "likeliest of all tokens",
    "gain": "gain, nats",
    "gain_other": "gain over another key, nats",
}


def _table(study: Study, view: View) -> Table:
    """A row for each variant, with intervals, and how its accuracy differs from that of the model's own form."""
    names = _keys(study)
    main = SUMS["accuracy"] if "accuracy" in names else SUMS["gain"]
    columns = ["model", *(LABELS[name] for name in names)]
    several = len(study.items) > len({variant.mode for variant in study.items})
    if several:
        columns.append(f"{'accuracy' if main == 'right' else 'gain'} against the own form")
    rows: list[list[Any]] = []
    for variant, cells in study.items.items():
        items = _flat(cells)
        row: list[Any] = [variant.name]
        for name in names:
            found = _interval(items, SUMS[name]) if SUMS[name] in items[0] else None
            row.append(_shown(found))
        if several:
            own = _flat(study.items[Variant(variant.mode, OWN)])
            row.append(None if variant.form == OWN or main not in items[0] else _shown(_difference(own, items, main)))
        rows.append(row)
    if "accuracy" in names:
        chance = f"{_chance(_flat(study.items[Variant(AS_IS, OWN)])):.3f}"
        rows.append(["chance", *(chance if name in ("accuracy", "calibrated") else None for name in names)])
        rows[-1] += [None] * (len(columns) - len(rows[-1]))
    return Table(TABLE, columns, rows, "In brackets: 95% interval, bootstrap over rows. " + view.note)


def _difference(own: list[dict[str, Any]], other: list[dict[str, Any]], key: str) -> Interval:
    return paired_bootstrap(_sums(own, key), _sums(other, key), _MEAN)


def _shown(found: Interval | None) -> str | None:
    return None if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _seeds(study: Study, what: str) -> Table:
    rows = [[form, seed, value] for form, values in study.by_seed.items() for seed, value in values.items()]
    return Table(
        "training on the task, by seed", ["attention", "seed", what], rows,
        "Whether a network finds the task depends on the seed; the intervals above do not hold that.",
    )  # fmt: skip


def _series(study: Study, view: View) -> list[Series]:
    found: list[Series] = []
    bins = _bins(study)
    for key, label in (("right", "accuracy"), ("gain", "gain, nats"), ("exact", "likeliest of all tokens")):
        chart = f"{view.title}: {label} by distance"
        curves = []
        for variant, cells in study.items.items():
            items = _flat(cells)
            if key not in items[0] or (key == "exact" and "right" in items[0]):
                continue
            points: list[tuple[float, float, float, float]] = []
            for middle, keep in bins:
                interval = _interval(items, key, keep)
                if interval is not None:
                    points.append((middle, interval.value, interval.low, interval.high))
            x, y, low, high = (list(column) for column in zip(*points, strict=True))
            xlabel = "distance to what is asked for, tokens"
            curves.append(Series(f"{label}, {variant.name}", x, y, xlabel, label, chart=chart, low=low, high=high))
        if curves and key != "exact":
            one, own = curves[0], _flat(study.items[Variant(AS_IS, OWN)])
            name = "chance" if key == "right" else "no recall"
            level = [_chance(own, keep) if key == "right" else 0.0 for _, keep in bins]
            curves.append(Series(name, one.x, level, one.xlabel, label, chart=chart, reference=True))
        found += curves
    for form, curve in study.curves.items():
        found.append(
            Series(
                "own form" if form == OWN else form,
                [p[0] for p in curve],
                [p[1] for p in curve],
                "step",
                "loss, nats per answer",
                chart=f"{view.title}: training on the task",
                scale="linear",
            )
        )
    return found


def _bins(study: Study) -> list[tuple[float, Any]]:
    """(x, which distances): single distances where there are few, else [2^k, 2^(k + 1))."""
    items = _flat(study.items[Variant(AS_IS, OWN)])
    distances = sorted({distance for item in items for distance in item["distance"]})
    if len(distances) <= FEW:
        return [(float(d), lambda x, d=d: x == d) for d in distances]
    powers = sorted({int(np.log2(distance)) for distance in distances})
    return [(2**0.5 * 2**p, lambda x, p=p: 2**p <= x < 2 ** (p + 1)) for p in powers]


def _grids(study: Study, view: View) -> list[Grid]:
    """Accuracy, from chance to 1, and gain of each variant by two facts of the cells, over cells that share them."""
    if view.kind.axes is None:
        return []
    rows, columns = (sorted({cell.facts[axis] for cell in view.kind.cells}) for axis in view.kind.axes)
    grids = []
    for variant, cells in study.items.items():
        for key, label in (("right", "accuracy"), ("gain", "gain, nats")):
            if key not in cells[0][0]:
                continue
            places: dict[tuple[int, ...], list[float]] = {}
            for cell, items in zip(view.kind.cells, cells, strict=True):
                found = [value for item in items for value in item[key]]
                places.setdefault(tuple(cell.facts[axis] for axis in view.kind.axes), []).extend(found)
            values = {place: float(np.mean(found)) for place, found in places.items()}
            grids.append(
                Grid(
                    f"{view.title}: {label}, {variant.name}",
                    [str(x) for x in columns],
                    [f"{y}%" if view.kind.axes[0] == "depth" else str(y) for y in rows],
                    [[values.get((y, x)) for x in columns] for y in rows],
                    "length, tokens",
                    view.kind.axes[0],
                    low=_chance(_flat(study.items[Variant(AS_IS, OWN)])) if key == "right" else 0.0,
                    high=1.0 if key == "right" else None,
                    note=view.note,
                )
            )
    return grids
