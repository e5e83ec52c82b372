"""Fresh results in Weights & Biases, where that is asked for. Whatever it does, the evaluation continues."""

from __future__ import annotations

import hashlib
import html
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.results.schema import ModelInfo, Result, Series
from pretrain.telemetry.trackers import WANDB_MODE, init_wandb, wandb_mode

if TYPE_CHECKING:
    from eval.subject import Subject

PROJECT = "nystrom-eval"
"""Of results without a run; those of a run go to its telemetry.wandb_project."""


class Tracking:
    """One run of wandb for the weights that are evaluated in this folder, however often: `wandb sync` joins its files.

    ``mode``: off, offline, or online. Opened with the first result, so that a command that finds everything there
    leaves nothing behind.
    """

    def __init__(self, folder: Path, mode: str, subject: Subject | None = None) -> None:
        self._folder = folder
        self._mode = mode
        if mode != "off":
            self._mode, note = wandb_mode(mode, os.environ.get(WANDB_MODE), key="--wandb", ask="--wandb ")
            if note is not None:
                print(note)
        self._info = subject.info() if subject is not None else ModelInfo()
        self._project = subject.loaded.run_config.telemetry.wandb_project if subject is not None else PROJECT
        self._run: Any = None

    def log(self, name: str, result: Result) -> None:
        """Send metrics, tables, curves and samples of the result under ``name``."""
        if self._run is None:
            self._open()
        if self._run is not None:
            self._try(lambda: self._run.log(payload(name, result)))

    def close(self) -> None:
        """Finish the files."""
        if self._run is not None:
            self._try(lambda: self._run.finish())

    def _open(self) -> None:
        for mode in {"online": ["online", "offline"], "offline": ["offline"]}.get(self._mode, []):
            self._mode = mode
            self._try(self._start)
            if self._run is not None:
                return

    def _start(self) -> None:
        self._run = start(self._folder, self._mode, self._info, self._project)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a tracker that fails in whatever way must not end an evaluation
            first_line = (str(error).splitlines() or [""])[0]
            print(f"wandb {self._mode} is left out: {type(error).__name__}: {first_line} (the results are on disk)")
            self._run, self._mode = None, "off"


def start(folder: Path, mode: str, info: ModelInfo, project: str) -> Any:
    """A run of wandb named after the trained run and its weights; its id follows from both and from the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return init_wandb(
        project=project,
        name=f"eval {info.run or folder.resolve().name} {info.weights_hash[:8]}".strip(),
        id=hashlib.sha256(f"{folder.resolve()} {info.weights_hash}".encode()).hexdigest()[:12],
        job_type="eval",
        dir=str(folder),
        mode=mode,
        config={
            "run": info.run,
            "weights": info.weights_hash,
            "objective": info.objective,
            "attention": info.attention,
            "parameters": info.parameters,
            "tokens": info.tokens,
        },
    )


def numbers(name: str, result: Result) -> dict[str, float]:
    """The result's finite numbers: SUITE/METRIC, with .std, .low and .high where there are such."""
    found: dict[str, float] = {}
    for metric, value in result.metrics.items():
        parts = {"": value.value, ".std": value.std, ".low": value.low, ".high": value.high}
        found |= {f"{name}/{metric}{end}": x for end, x in parts.items() if x is not None and math.isfinite(x)}
    return found


def payload(name: str, result: Result) -> dict[str, Any]:
    """What is logged of a result, under names that begin with the suite's."""
    import wandb

    found: dict[str, Any] = dict(numbers(name, result))
    found[f"{name}/gate"] = result.gate
    for table in result.tables:
        found[f"{name}/{table.name}"] = wandb.Table(
            columns=list[str | int](table.columns), data=table.rows, allow_mixed_types=True
        )
    charts: dict[str, list[Series]] = {}
    for series in result.series:
        charts.setdefault(series.chart or series.name, []).append(series)
    for chart, curves in charts.items():
        found[f"{name}/chart: {chart}"] = wandb.plot.line_series(
            xs=[curve.x for curve in curves],
            ys=[curve.y for curve in curves],
            keys=[curve.name for curve in curves],
            title=chart,
            xname=curves[0].xlabel,
        )
    if result.samples:
        page = "".join(
            f"<pre>{html.escape(chr(10).join(f'{k}: {v}' for k, v in sample.items()))}</pre>"
            for sample in result.samples
        )
        found[f"{name}/samples"] = wandb.Html(page)
    return found
