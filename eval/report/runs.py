"""Reading what the report shows, forgiving what a killed run leaves behind.

A RUN is a run folder as ``nystrom train`` writes it, one of its checkpoints, or a folder that holds nothing but
evaluation results. A checkpoint ``RUN/checkpoints/stepN`` is the run as far as that step, with the results of
``RUN/eval/stepN``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from eval.results.caution import outdated
from eval.results.schema import Result, read_result

EVAL = "eval"
CHECKPOINTS = "checkpoints"
STEP = re.compile(r"step0*(\d+)")


@dataclass(frozen=True)
class Stage:
    """A stretch of the run at one sequence length, in tokens of the run."""

    start: float
    end: float
    seq_len: int


@dataclass
class Run:
    """What a run folder holds, as far as it is there; ``problems`` says in words what could not be read.

    ``results`` by the name of their file; ``folder`` is where they lie, ``unread`` how
    many there cannot be read. ``trained``: whether this is a run or one of its
    checkpoints, and not only results.
    """

    path: Path
    name: str
    config: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    folder: Path | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: int = 0
    trained: bool = True

    @property
    def objective(self) -> str:
        """ "mlm", "clm", or "" where the configuration does not say."""
        return str(self.setting("model", "objective") or "")

    def setting(self, *keys: str) -> Any:
        """The configuration's value under these keys, or None."""
        node: Any = self.config
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def of_task(self, task: str) -> list[Result]:
        """The results of one task."""
        return [result for result in self.results.values() if result.task == task]

    def is_own_text(self, result: Result) -> bool:
        """Whether a result is of the held-out text that the run's own curve is of (its ``data.valid``)."""
        named, read = self.setting("data", "valid"), result.data.get("path")
        if not named or not read or result.settings.get("text") or result.settings.get("dataset"):
            return False
        return str(named) == str(read) or Path(str(named)).resolve() == Path(str(read)).resolve()

    def outdated(self, result: Result) -> str:
        """That the run has been trained on since a result of it, and how far it was then; "" where it was not."""
        return outdated(result.model, self.reached()) if self.trained else ""

    @property
    def behind(self) -> str:
        """What :meth:`outdated` says, where it says the same of all results; else ""."""
        said = {self.outdated(result) for result in self.results.values() if result.model.weights_hash}
        return said.pop() if len(said) == 1 else ""

    def reached(self) -> float:
        """Tokens seen, 0 where nothing says."""
        records = [*self.train[-1:], *self.valid[-1:], *self.events]  # the first two rise
        return max((float(r["tokens"]) for r in records if isinstance(r.get("tokens"), int | float)), default=0.0)

    def stages(self) -> list[Stage]:
        """The curriculum, cut where the run has got to."""
        reached = max((r["tokens"] for r in [*self.train, *self.valid]), default=0)
        stages: list[Stage] = []
        start = 0.0
        curriculum = self.setting("curriculum")
        for raw in curriculum if isinstance(curriculum, list) else []:
            end, seq_len = (raw.get(key) if isinstance(raw, dict) else None for key in ("until_tokens", "seq_len"))
            if not isinstance(end, int | float) or not isinstance(seq_len, int):
                return []
            if start < reached:
                stages.append(Stage(start, float(end), seq_len))
            start = float(end)
        if stages:  # the last stage is rounded up to a whole window, or the run ended early
            stages[-1] = Stage(stages[-1].start, float(reached), stages[-1].seq_len)
        return stages


def read_run(path: str | Path) -> Run:
    """Read one RUN; raises :class:`UserError` for a folder that is none."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"run folder {path} does not exist")
    if _is_run(path):
        return _trained(path, path / EVAL)
    place = path.resolve()
    for kind in (CHECKPOINTS, EVAL):
        if place.parent.name == kind and STEP.fullmatch(place.name) and _is_run(place.parent.parent):
            return _checkpoint(place.parent.parent, place.name)
    if place.name == EVAL and _is_run(place.parent):
        return _trained(place.parent, place)
    if not any(_looks_like_result(file) for file in sorted(path.glob("*.json"))):
        raise UserError(
            f"{path} is not a run folder: it has neither config.yaml nor metrics.jsonl, nor evaluation results"
        )
    run = Run(path, (place.parent if place.name == EVAL else place).name, {}, trained=False)
    _read_results(run, path)
    return run


def read_runs(paths: list[str]) -> list[Run]:
    """Read several runs; names that occur twice are replaced by the folder and the one it lies in, or by the path."""
    runs = [read_run(path) for path in dict.fromkeys(paths)]
    for longer in (lambda run: "/".join(run.path.resolve().parts[-2:]), lambda run: str(run.path)):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = longer(run)
    return runs


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as dotted keys."""
    items: list[tuple[Any, Any]]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    result: dict[str, Any] = {}
    for key, item in items:
        result |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return result


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl"))


def _trained(path: Path, results: Path) -> Run:
    run = Run(path, path.resolve().name, _read_config(path / "config.yaml"))
    run.name = str(run.config.get("name") or run.name)
    _read_metrics(run, path / "metrics.jsonl")
    _read_results(run, results)
    try:
        run.environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        run.problems.append(f"environment.json cannot be read: {error}")
    return run


def _checkpoint(path: Path, tag: str) -> Run:
    """The run as far as the checkpoint's step, with the results of that checkpoint."""
    run = _trained(path, path / EVAL / tag)
    match = STEP.fullmatch(tag)
    assert match is not None
    step = int(match[1])
    run.path = path / CHECKPOINTS / tag
    run.name = f"{run.name} step {step:,}"
    for records in (run.train, run.valid, run.events):
        records[:] = [r for r in records if isinstance(r.get("step"), int) and r["step"] <= step]
    return run


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} does not hold a run's configuration")
    return raw


def _read_metrics(run: Run, path: Path) -> None:
    """Sort records by kind. Where a resumed run repeats tokens, the later record replaces the earlier."""
    if not path.is_file():
        run.problems.append("no metrics.jsonl: nothing was trained yet")
        return
    kinds = {"train": run.train, "valid": run.valid, "event": run.events}
    bad = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                bad += bool(line.strip())
                continue
            if not isinstance(record, dict) or record.get("kind") not in kinds:
                continue
            records = kinds[record["kind"]]
            if record["kind"] != "event":
                if not isinstance(record.get("tokens"), int | float):
                    bad += 1
                    continue
                while records and records[-1]["tokens"] >= record["tokens"]:
                    records.pop()
            records.append(record)
    if bad:
        run.problems.append(f"metrics.jsonl: {bad} line(s) could not be read (a killed run may leave half a line)")


def _looks_like_result(path: Path) -> bool:
    """Whether the file is a result, of any schema."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and {"task", "metrics", "model"} <= raw.keys()


def _read_results(run: Run, folder: Path) -> None:
    run.folder = folder
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            result = read_result(file)
            fault = _fault(result)
            if fault:
                raise UserError(f"{file} does not follow the result schema ({fault}): delete it and evaluate again")
            run.results[file.stem] = result
        except UserError as error:
            run.problems.append(str(error))
            run.unread += 1
    models = {tuple(result.model.identity) for result in run.results.values() if result.model.weights_hash}
    if len(models) > 1:
        run.problems.append(
            "the evaluation results are of different weights or configurations of this run: evaluate again to bring "
            "them level"
        )


def _fault(result: Result) -> str:
    """What of the tables, curves, grids and samples does not fit together; "" if all does."""
    for name, metric in result.metrics.items():
        bounds = (metric.std, metric.n, metric.low, metric.high)
        if not isinstance(metric.value, int | float) or not all(
            b is None or isinstance(b, int | float) for b in bounds
        ):
            return f"metric {name} is no number"
    for table in result.tables:
        if not all(isinstance(row, list) and len(row) == len(table.columns) for row in table.rows):
            return f"table {table.name!r} has rows of another width than its columns"
    for series in result.series:
        columns = [series.x, series.y, *(bound for bound in (series.low, series.high) if bound is not None)]
        if not all(isinstance(column, list) and len(column) == len(series.x) for column in columns):
            return f"series {series.name!r} has columns of different lengths"
    for grid in result.grids:
        if len(grid.values) != len(grid.y) or any(len(row) != len(grid.x) for row in grid.values):
            return f"grid {grid.name!r} has values of another shape than its axes"
    if not all(isinstance(sample, dict) for sample in result.samples):
        return "samples that are no objects"
    if not isinstance(result.settings, dict) or not isinstance(result.data, dict):
        return "settings or data that are no objects"
    return ""
