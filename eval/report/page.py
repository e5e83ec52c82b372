"""From runs to the page: what is compared, and what the template is given."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from eval.classification.task import MODEL_ROW, SCRATCH_ROW, TABLE
from eval.language_modeling.task import POSITION_SERIES
from eval.report import charts
from eval.report.runs import Run, flatten
from eval.results.schema import Metric, Result
from eval.validity.checks import CHECKS_TABLE

FOLDER = Path(__file__).parent
OBJECTIVES = {"mlm": "masked", "clm": "causal"}
# The summary's rows: (result, metric, label). What a result has beyond these is in its own section.
SUMMARY = [
    ("lm", "perplexity", "Held-out perplexity, per token"),
    ("lm", "word_perplexity", "Held-out perplexity, per word"),
    ("lm", "bits_per_byte", "Held-out bits per byte"),
    ("lm", "masked_accuracy", "Masked accuracy, held-out"),
    ("lm", "masked_loss", "Masked loss, held-out, nats"),
    ("classify", "accuracy", "Classification accuracy, fine-tuned"),
    ("classify", "scratch_accuracy", "… the same network from scratch"),
    ("classify", "macro_f1", "Classification macro F1, fine-tuned"),
    ("generate", "distinct_2", "Generated text, distinct-2"),
    ("generate", "repetition_4", "Generated text, repeated 4-grams"),
    ("generate", "top_1", "Masked words filled in rightly"),
]
# No winner is marked here: more variety than real text is not better, and the control is not the model.
UNRANKED = {"distinct_2", "repetition_4", "scratch_accuracy"}


def render(runs: Sequence[Run], title: str | None = None) -> str:
    """The whole page. Everything that comes from files is escaped; only our own SVG goes in as it is."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    environment.filters["visible"] = visible
    environment.filters["count"] = charts.engineering
    names = [run.name for run in runs]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return environment.get_template("page.html").render(
        title=title or f"Pretraining report: {shown}",
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        runs=list(enumerate(runs)),
        colours=charts.NUM_COLOURS,
        objectives=OBJECTIVES,
        banners=[banner(run) for run in runs],
        summary=summary(runs),
        training=training_charts(runs),
        lm_tables=lm_tables(runs),
        positions=charts.curves(position_series(runs), "Loss by position in the window"),
        classification=classification(runs),
        samples=[(i, run, run.results["generate"]) for i, run in enumerate(runs) if "generate" in run.results],
        differences=differences([flatten(run.config) for run in runs], skip={"name", "output_dir"}),
        configs=[
            (run.name, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) for run in runs if run.config
        ],
        machine=side_by_side([flatten(environment_of(run)) for run in runs]),
    )


def number(value: Any) -> str:
    """A cell as text: about four significant digits, thousands separated, pass or FAIL for truth values."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "pass" if value else "FAIL"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.1e}"
    return (
        f"{value:.3f}"
        if size < 10
        else f"{value:.2f}"
        if size < 100
        else f"{value:.1f}"
        if size < 1000
        else f"{value:,.0f}"
    )


def visible(text: str) -> str:
    """A token with its white space made visible; the space that begins most words is left out."""
    text = text[1:] if text.startswith(" ") and text.strip() else text
    text = re.sub(" {4,}", lambda run: f"␣×{len(run[0])}", text)
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"


def banner(run: Run) -> dict[str, Any]:
    """What the validity gate said: state is "passed", "failed" or "unknown"."""
    result = run.results.get("validity")
    table = result.table(CHECKS_TABLE) if result else None
    if result is None or table is None:
        return {"run": run.name, "state": "unknown", "text": "validity not checked", "table": None}
    failed = [row[0] for row in table.rows if not row[3]]
    if failed:
        return {"run": run.name, "state": "failed", "text": f"failed: {'; '.join(failed)}", "table": table}
    stale = any(r.model.weights_hash != result.model.weights_hash for r in run.results.values())
    if stale:
        return {
            "run": run.name,
            "state": "unknown",
            "text": "checked on other weights than those scored below",
            "table": table,
        }
    return {"run": run.name, "state": "passed", "text": f"all {len(table.rows)} validity checks passed", "table": table}


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of the first table: a label and a cell for each run, the best marked where the figures can be compared."""
    rows: list[dict[str, Any]] = [
        _facts("Objective", [OBJECTIVES.get(run.objective, "–") for run in runs]),
        _facts("Attention", [str(run.setting("model", "attention") or "–") for run in runs]),
        _facts("Parameters", [_of_any(run, "parameters") for run in runs]),
        _facts("Tokens seen", [charts.engineering(_tokens(run)) for run in runs]),
        _facts("Training time", [_duration(run) for run in runs]),
        _facts("Last held-out loss while training", [number(_last(run.valid, "loss")) for run in runs]),
    ]
    for suite, metric, label in SUMMARY:
        results = [run.results.get(suite) for run in runs]
        found = [r.metrics.get(metric) if r else None for r in results]
        if not any(found):
            continue
        cells = [
            {"text": number(m.value), "std": number(m.std) if m.std is not None else None, "best": False}
            if m
            else {"text": "–", "std": None, "best": False}
            for m in found
        ]
        up = next(m.higher_is_better for m in found if m)
        if metric not in UNRANKED and _comparable([r for r in results if r]):
            winner = best_of(found)
            if winner is not None:
                cells[winner]["best"] = True
        arrow = "" if metric in UNRANKED else "higher is better" if up else "lower is better"
        rows.append({"label": label, "hint": arrow, "cells": cells})
    return rows


def best_of(metrics: Sequence[Metric | None]) -> int | None:
    """Place of the best value; None with fewer than two, or where the next is within either's standard deviation."""
    found = [(m, i) for i, m in enumerate(metrics) if m and math.isfinite(m.value)]
    if len(found) < 2:
        return None
    found.sort(key=lambda pair: pair[0].value, reverse=bool(found[0][0].higher_is_better))
    (first, place), (second, _) = found[:2]
    clear = abs(first.value - second.value) > max(first.std or 0.0, second.std or 0.0)
    return place if clear else None


def training_charts(runs: Sequence[Run]) -> list[tuple[Markup, str]]:
    """Pictures of the training, each with a caption."""
    pictures: list[tuple[Markup | None, str]] = []
    everyone = list(enumerate(runs))
    for objective, word in [*OBJECTIVES.items(), ("", "")]:
        group = [(i, run) for i, run in everyone if run.objective == objective]
        title = f"Loss, {word} models" if word else "Loss"
        pictures.append((charts.loss(group, title), f"{title}. Line: training; dots: held-out text."))
    pictures.append(
        (charts.over_tokens(everyone, "tokens_per_second", "tokens per second", "Throughput"), "Throughput.")
    )
    pictures.append((charts.over_tokens(everyone, "lr", "learning rate", "Learning rate"), "Learning rate."))
    pictures.append(
        (
            charts.over_tokens(everyone, "grad_norm", "norm before clipping", "Gradient norm", log=True),
            "Gradient norm, before clipping.",
        )
    )
    pictures.append(
        (
            charts.over_tokens(everyone, "data_wait", "share of time", "Waiting for data", share=True),
            "Time spent waiting for data.",
        )
    )
    return [(picture, caption) for picture, caption in pictures if picture is not None]


def lm_tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One table for each objective, with the rows of all its runs and what they were measured on."""
    tables = []
    for objective, word in OBJECTIVES.items():
        rows: list[dict[str, Any]] = []
        columns: list[str] = []
        notes: list[str] = []
        for index, run in enumerate(runs):
            result = run.results.get("lm")
            if result is None or result.model.objective != objective or not result.tables:
                continue
            columns = result.tables[0].columns
            rows += [{"run": run.name, "index": index, "cells": row} for row in result.tables[0].rows]
            tokens = min(result.settings.get("max_tokens") or math.inf, result.data.get("tokens", math.inf))
            note = (
                f"{charts.engineering(tokens)} tokens of {result.data.get('path')}, in windows of "
                f"{result.settings['length']:,} that do not overlap"
            )
            notes += [note] if note not in notes else []
        if rows:
            tables.append({"title": f"{word.capitalize()} models", "columns": columns, "rows": rows, "notes": notes})
    return tables


def position_series(runs: Sequence[Run]) -> list[tuple[int, Any]]:
    """The loss-by-position curve of every run that has one."""
    return [
        (index, series)
        for index, run in enumerate(runs)
        if "lm" in run.results
        for series in run.results["lm"].series
        if series.name == POSITION_SERIES
    ]


def classification(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each data set: the bars, the table, and what was read."""
    groups: dict[str, list[tuple[int, Run, Result]]] = {}
    for index, run in enumerate(runs):
        for result in run.results.values():
            if result.task == "classify" and result.table(TABLE):
                groups.setdefault(result.data["hash"], []).append((index, run, result))
    return [_data_set(members, f"Classification accuracy {place}") for place, members in enumerate(groups.values(), 1)]


def _data_set(members: Sequence[tuple[int, Run, Result]], title: str) -> dict[str, Any]:
    """One data set's runs, with the controls once: they do not depend on the run unless texts were cut differently."""
    bars: list[tuple[str, float, float | None, int | None]] = []
    controls: dict[str, list[Any]] = {}
    rows: list[dict[str, Any]] = []
    columns: list[str] = []
    for index, run, result in members:
        table = result.table(TABLE)
        assert table is not None  # only such members are grouped
        columns = table.columns
        for row in table.rows:
            name, accuracy, std = row[:3]
            if name == MODEL_ROW:
                bars.append((f"{run.name}, pretrained", accuracy, std, index))
            elif name == SCRATCH_ROW:
                bars.append((f"{run.name}, from scratch", accuracy, std, None))
            elif controls.setdefault(name, row) is not row:
                continue
            rows.append({"run": run.name, "index": index, "cells": row})
    bars += [(row[0], row[1], row[2], None) for row in sorted(controls.values(), key=lambda row: -row[1])]
    data = members[0][2].data
    lengths = " or ".join(f"{n:,}" for n in sorted({result.settings["max_length"] for _, _, result in members}))
    return {
        "note": f"{len(data['classes'])} classes, {data['train_records']:,} training texts ({data['train']}) and "
        f"{data['test_records']:,} test texts ({data['test']}), up to {lengths} tokens of each.",
        "bars": charts.bars(bars, title),
        "columns": columns,
        "rows": rows,
    }


def differences(configs: Sequence[dict[str, Any]], skip: set[str]) -> list[tuple[str, list[str]]]:
    """Keys on which the configurations differ, with each one's value."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in skip)
    rows = [(key, [_plain(config.get(key)) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def side_by_side(environments: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Every key, with each run's value."""
    keys = dict.fromkeys(key for values in environments for key in values)
    return [(key, [_plain(values.get(key)) for values in environments]) for key in keys]


def environment_of(run: Run) -> dict[str, Any]:
    """Where it was trained, and where it was evaluated."""
    result = next(iter(run.results.values()), None)
    return {"training": run.environment} | ({"evaluation": result.environment} if result else {})


def _facts(label: str, texts: list[str]) -> dict[str, Any]:
    return {"label": label, "hint": "", "cells": [{"text": text, "std": None, "best": False} for text in texts]}


def _comparable(results: Sequence[Result]) -> bool:
    """Same data and the same settings of the measurement (precision and the like may differ)."""
    keys = ("length", "max_tokens", "mask_rate", "seed", "seeds", "max_length", "num_samples", "prompt")
    return len({(r.data["hash"], str([r.settings.get(key) for key in keys])) for r in results}) == 1


def _of_any(run: Run, name: str) -> str:
    return next((f"{getattr(result.model, name):,}" for result in run.results.values()), "–")


def _tokens(run: Run) -> float:
    return max(
        (float(r["tokens"]) for r in [*run.train, *run.valid, *run.events] if isinstance(r.get("tokens"), int | float)),
        default=0.0,
    )


def _last(records: Sequence[dict[str, Any]], key: str) -> Any:
    return records[-1].get(key) if records else None


def _duration(run: Run) -> str:
    seconds = _last(run.train, "seconds")
    if not isinstance(seconds, int | float):
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value is None else str(value)
