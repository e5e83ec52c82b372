"""The one schema of evaluation results, and the store that never computes the same result twice.

A result is keyed by what determines it: the weights, the task with its settings, the data, and the version of the code
that computes it. A file that holds a finished result of the same key is returned as it is; any other is replaced,
atomically, so that a killed evaluation leaves either the old result or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic

SCHEMA = 1


@dataclass(frozen=True)
class Metric:
    """One number: with ``std`` a mean over ``n`` seeds, else a figure over ``n`` items."""

    value: float
    higher_is_better: bool
    std: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows of plain values (text, numbers, booleans, None) under named columns."""

    name: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Series:
    """A curve."""

    name: str
    x: list[float]
    y: list[float]
    xlabel: str
    ylabel: str


@dataclass(frozen=True)
class ModelInfo:
    """Which weights were evaluated."""

    weights_hash: str
    run: str
    objective: str
    attention: str
    parameters: int
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """What a task computes, before it is dressed as a :class:`Result`."""

    metrics: dict[str, Metric]
    tables: list[Table] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """One finished task on one set of weights: what ``RUN/eval/<task>.json`` holds."""

    task: str
    key: str
    model: ModelInfo
    settings: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, Metric]
    tables: list[Table]
    series: list[Series]
    samples: list[dict[str, Any]]
    seconds: float
    created: str
    environment: dict[str, Any]
    schema: int = SCHEMA

    def table(self, name: str) -> Table | None:
        """The table called ``name``, or None."""
        return next((table for table in self.tables if table.name == name), None)


def result_key(task: str, version: int, weights_hash: str, settings: dict[str, Any], data_hash: str) -> str:
    """The sha256 of all that determines a result; ``version`` is the task's own, raised when its numbers change."""
    parts = {
        "schema": SCHEMA,
        "task": task,
        "version": version,
        "weights": weights_hash,
        "settings": settings,
        "data": data_hash,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def run_task(
    path: Path,
    *,
    task: str,
    version: int,
    model: ModelInfo,
    settings: dict[str, Any],
    data: dict[str, Any],
    compute: Callable[[], Outcome],
    rerun: bool = False,
) -> tuple[Result, bool]:
    """Return the finished result at ``path`` if its key is this one, else compute and write it.

    ``data`` must have a ``hash``. The second value tells whether it was computed now.
    """
    key = result_key(task, version, model.weights_hash, settings, data["hash"])
    if not rerun:
        old = read_result_or_none(path)
        if old is not None and old.key == key:
            return old, False
    started = time.perf_counter()
    outcome = compute()
    result = Result(
        task=task,
        key=key,
        model=model,
        settings=settings,
        data=data,
        metrics=outcome.metrics,
        tables=outcome.tables,
        series=outcome.series,
        samples=outcome.samples,
        seconds=round(time.perf_counter() - started, 3),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(),
    )
    write_result(path, result)
    return result, True


def write_result(path: Path, result: Result) -> None:
    """Write atomically: a reader sees the old file or the whole new one. Numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = asdict(result)
    raw["metrics"] = {
        name: {k: v for k, v in metric.items() if v is not None or k == "value"}
        for name, metric in raw["metrics"].items()
    }
    text = json.dumps(_finite(raw), ensure_ascii=False, indent=1, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_result(path: Path) -> Result:
    """Read a result file; raises :class:`UserError` for a missing, damaged or foreign file."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no evaluation result at {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable result file ({error}): delete it and evaluate again") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else None
        raise UserError(f"{path} has schema {found}, this version reads {SCHEMA}: evaluate again")
    try:
        raw["model"] = ModelInfo(**raw["model"])
        raw["metrics"] = {
            name: Metric(**{**metric, "value": math.nan if metric["value"] is None else metric["value"]})
            for name, metric in raw["metrics"].items()
        }
        raw["tables"] = [Table(**table) for table in raw["tables"]]
        raw["series"] = [Series(**series) for series in raw["series"]]
        return Result(**raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not follow the result schema ({error}): delete it and evaluate again") from None


def read_result_or_none(path: Path) -> Result | None:
    """The result at ``path``, or None where there is none that can be read."""
    try:
        return read_result(path)
    except UserError:
        return None


def environment() -> dict[str, Any]:
    """What the numbers were computed with: versions, machine, threads."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "nystrom-pretrain": _version("nystrom-pretrain"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
