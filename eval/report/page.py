"""From runs to the page: what the templates are given."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.report import base
from eval.report import charts, numbers, samples, tables
from eval.report.runs import Run, flatten
from eval.report.sections import sections
from eval.report.summary import banner, facts, scores
from eval.report.tables import config_differences, side_by_side
from eval.report.training import training_charts

FOLDER = Path(__file__).parent


def render(runs: Sequence[Run], title: str | None = None) -> str:
    """The whole page. Everything that comes from files is escaped; only our own SVG goes in as it is."""
    environment = base.environment(FOLDER)
    environment.filters |= {
        "number": numbers.number,
        "cell": numbers.cell,
        "measure": numbers.measure,
        "visible": numbers.visible,
        "heading": numbers.title,
    }
    environment.globals |= {
        "colours": charts.NUM_COLOURS,
        "open_samples": samples.OPEN,
        "most_samples": samples.MOST,
        "most_metrics": tables.MOST_METRICS,
    }
    everyone = list(enumerate(runs))
    configured = [(index, run) for index, run in everyone if run.config]
    names = [run.name for run in runs]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return environment.get_template("page.html").render(
        title=title or f"Pretraining report: {shown}",
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=base.style(FOLDER),
        runs=everyone,
        configured=configured,
        banners=[found for run in runs if (found := banner(run))],
        problems=[(run.name, problem) for run in runs for problem in run.problems],
        facts=facts(runs),
        scores=scores(runs),
        training=training_charts(runs),
        sections=sections(runs),
        differences=config_differences([flatten(run.config) for _, run in configured], skip={"name", "output_dir"}),
        configs=[(run.name, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) for _, run in configured],
        machine=side_by_side([flatten(_environment(run)) for run in runs]),
    )


def _environment(run: Run) -> dict[str, Any]:
    """Where it was trained, and where it was evaluated."""
    result = next(iter(run.results.values()), None)
    training = {"training": run.environment} if run.environment else {}
    return training | ({"evaluation": result.environment} if result else {})
