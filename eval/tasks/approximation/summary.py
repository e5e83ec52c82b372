"""The figures as metrics, tables, curves and heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.results.schema import Grid, Metric, Outcome, Series, Table
from eval.tasks.approximation.figures import Figures, Floats
from eval.tasks.approximation.observe import MEAN_OF_V
from eval.tasks.approximation.variants import TRAINED, swept

ERROR = "relative error of the attention's output"
_ADAPTED = "Weights adapt to the attention they are trained with: a change tells of them, and is no verdict on a form."


def summarize(figures: Figures) -> Outcome:
    """The outcome."""
    return Outcome(
        metrics=figures.metrics,
        tables=[_forms(figures), _layers(figures), *_sweep_tables(figures)],
        series=[*_layer_series(figures), *_sweep_series(figures)],
        grids=_grids(figures),
        records=figures.records,
        estimators=figures.estimators,
    )


def _forms(figures: Figures) -> Table:
    loss, masked = _words(figures.loss), not figures.causal
    columns = ["attention", "relative error", f"{loss}, nats", "change", "low", "high"]
    rows: list[list[Any]] = []
    for variant in figures.shown:
        error = 0.0 if variant.key == "exact" else None
        if variant.compared:
            error = figures.error(variant.key)
        row = [variant.title, error, figures.nats(variant.key), *_with_interval(figures.changes.get(variant.key))]
        if masked:
            key = "masked_accuracy" + ("" if variant.key == TRAINED else f"_{variant.key}")
            row.append(figures.metrics[key].value)
        rows.append(row)
    columns += ["masked accuracy"] if masked else []
    rows.append([MEAN_OF_V, figures.error(MEAN_OF_V), *[None] * (len(columns) - 2)])
    note = (
        "All on the same weights. Errors: mean over layers, heads and windows, on the queries, keys and values of the "
        "model as trained, against exact softmax attention; the convolution left out. Loss: the attention is that in "
        f"every layer; the change is that of the same windows, with its 95% interval. {_ADAPTED}"
    )
    return Table("attention against exact attention", columns, rows, note)


def _layers(figures: Figures) -> Table:
    trained = figures.errors[TRAINED]
    columns: dict[str, Floats] = {"relative error": trained.mean(1), "of the worst head": trained.max(1)}
    titles = {"pooled": "without the inverse", "flat": "flat landmarks", "window": "window alone", MEAN_OF_V: MEAN_OF_V}
    columns |= {title: figures.errors[key].mean(1) for key, title in titles.items() if key in figures.errors}
    titles = {"matrix": "error of the matrix", "matrix_uniform": "of the uniform matrix"}
    titles |= {"entropy": "entropy, nats", "entropy_share": "share of log n", "near": "mass in the window"}
    columns |= {title: mean.mean(1) for name, title in titles.items() if (mean := figures.mean(name)) is not None}
    names = figures.config.attention_by_layer
    rows = [
        [
            f"layer {layer + 1}" + ("" if isinstance(figures.config.attention, str) else f" ({names[layer]})"),
            *(float(values[layer]) for values in columns.values()),
            *_with_interval(figures.changes[f"exact_layer_{layer + 1}"]),
        ]
        for layer in range(figures.config.num_layers)
    ]
    note = (
        "Means over heads and windows. The matrix is the n by n one that the attention amounts to, against exact "
        "attention's weights. Entropy is that of exact attention's rows. The last columns: what exact attention in "
        "that layer alone changes, with its 95% interval."
    )
    return Table("by layer", ["", *columns, f"change of the {_words(figures.loss)}", "low", "high"], rows, note)


def _layer_series(figures: Figures) -> list[Series]:
    count = figures.config.num_layers
    layers = [float(layer + 1) for layer in range(count)]
    titles = {variant.key: variant.title for variant in figures.shown}

    def curve(name: str, values: Sequence[float], ylabel: str, chart: str = "", reference: bool = False) -> Series:
        y = [float(value) for value in values]
        return Series(name, layers, y, "layer", ylabel, chart, scale="linear", reference=reference)

    chart = "error by layer"
    found = [
        curve(titles[key], figures.errors[key].mean(1), ERROR, chart)
        for key in (TRAINED, "pooled", "flat", "window")
        if key in figures.errors
    ]
    found.append(curve(MEAN_OF_V, figures.errors[MEAN_OF_V].mean(1), ERROR, chart, reference=True))
    for name, title, label in (
        ("entropy_share", "entropy of exact attention", "share of the largest entropy, log n"),
        ("near", "exact attention inside the window", "share of exact attention's weight"),
    ):
        mean = figures.mean(name)
        if mean is not None:
            found.append(curve(title, mean.mean(1), label))
    label = f"{_words(figures.loss)}, nats per {'token' if figures.causal else 'target'}"
    chart = f"{_words(figures.loss)} with exact attention in one layer"
    swapped = [figures.nats(f"exact_layer_{layer + 1}") for layer in range(count)]
    found.append(curve("exact in this layer", swapped, label, chart))
    found.append(curve("as trained, all layers", [figures.nats(TRAINED)] * count, label, chart, True))
    found.append(curve("exact, all layers", [figures.nats("exact")] * count, label, chart, True))
    return found


def _sweep_points(figures: Figures, name: str, values: Sequence[int]) -> list[tuple[int, str]]:
    """(value, key of the variant) for each value of a setting."""
    own = getattr(figures.config, name)
    return [(value, TRAINED if value == own else f"{name}_{value}") for value in values]


def _sweep_tables(figures: Figures) -> list[Table]:
    found = []
    for name, values in swept(figures.config, figures.settings).items():
        rows: list[list[Any]] = [
            [value, key == TRAINED, figures.error(key), figures.nats(key), *_with_interval(figures.changes.get(key))]
            for value, key in _sweep_points(figures, name, values)
        ]
        columns = [name, "as trained", "relative error", f"{_words(figures.loss)}, nats", "change", "low", "high"]
        note = f"Errors on the queries, keys and values of the model as trained. {_ADAPTED}"
        found.append(Table(f"other {_words(name)}", columns, rows, note))
    return found


def _sweep_series(figures: Figures) -> list[Series]:
    found = []
    for name, values in swept(figures.config, figures.settings).items():
        points = _sweep_points(figures, name, values)
        x, title, loss = [float(value) for value, _ in points], _words(name), _words(figures.loss)
        label = f"{title} (trained with {getattr(figures.config, name)})"
        nats = [figures.nats(key) for _, key in points]
        found.append(Series(f"{loss} by {title}", x, nats, label, f"{loss}, nats"))
        found.append(Series(f"error by {title}", x, [figures.error(key) for _, key in points], label, ERROR))
    return found


def _grids(figures: Figures) -> list[Grid]:
    x = [str(head + 1) for head in range(figures.config.num_heads)]
    y = [str(layer + 1) for layer in range(figures.config.num_layers)]

    def grid(name: str, values: Floats, high: float | None, note: str) -> Grid:
        return Grid(name, x, y, values.tolist(), "head", "layer", 0.0, high, note)

    trained, mean = figures.errors[TRAINED], figures.errors[MEAN_OF_V]
    worse = (
        f"{int((trained >= mean).sum())} of {mean.size} heads are no nearer to exact attention than the mean of V is."
    )
    found = [
        grid("relative error by layer and head", trained, None, worse),
        grid("error of the mean of V", mean, None, "What attending to all tokens alike would give."),
    ]
    for name, title, note in (
        (
            "entropy_share",
            "entropy of exact attention",
            "As a share of log n, n the tokens that a query sees: 1 is even.",
        ),
        (
            "near",
            "exact attention inside the window",
            "Mean over the tokens that see anything beyond the window; the rest must go through landmarks.",
        ),
    ):
        values = figures.mean(name)
        if values is not None:
            found.append(grid(title, values, 1.0, note))
    return found


def _with_interval(metric: Metric | None) -> list[float | None]:
    """Value, low, high."""
    return [metric.value, metric.low, metric.high] if metric else [None, None, None]


def _words(name: str) -> str:
    return name.replace("_", " ")
