"""The one schema of evaluation results: what a suite computes, and the file that holds it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic

SCHEMA = 2


@dataclass(frozen=True)
class Metric:
    """One number: with ``std`` a mean over ``n`` seeds, else a figure over ``n`` items.

    ``higher_is_better`` is None where neither is (the variety of generated text). ``low`` and ``high`` are the bounds
    of the 95% interval, over the items. ``unit``: what ``n`` counts, in the plural (tokens, texts, seeds); "" in files
    of earlier versions.
    """

    value: float
    higher_is_better: bool | None
    std: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""

    @property
    def over(self) -> str:
        """What the number is of, as text: "1,024 tokens", "1 seed"; "" where that is not known."""
        if self.n is None:
            return ""
        unit = self.unit or ("seeds" if self.std is not None else "")
        return f"{self.n:,} {unit.removesuffix('s') if self.n == 1 else unit}".rstrip()


@dataclass(frozen=True)
class Table:
    """Rows of plain values (text, numbers, booleans, None) under named columns; ``note`` stands below."""

    name: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A curve. Curves of one ``chart`` (default: their own name) are drawn in one picture, those of several runs too.

    ``low`` and ``high`` bound a band around ``y``. ``scale`` is of the x axis. ``reference``: a control or a published
    value, drawn without the run's colour.
    """

    name: str
    x: list[float]
    y: list[float]
    xlabel: str
    ylabel: str
    chart: str = ""
    low: list[float] | None = None
    high: list[float] | None = None
    scale: str = "log2"
    reference: bool = False


@dataclass(frozen=True)
class Grid:
    """A heat map: ``values[i][j]`` (None where there is none) at row ``y[i]`` and column ``x[j]``, both as text.

    ``low`` and ``high`` are the ends of the colours (chance and 1 for an accuracy, say), the least and greatest value
    where None.
    """

    name: str
    x: list[str]
    y: list[str]
    values: list[list[float | None]]
    xlabel: str
    ylabel: str
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Estimator:
    """How a metric follows from the records of single samples: ``scale`` · Σ numerator / Σ denominator.

    Both name a field of the records; without ``denominator`` it is the mean of the numerator. ``log2``-like
    transforms belong into ``scale``; ``exponential`` takes exp of the whole (perplexities). It is what the intervals
    and the paired comparison of two models resample. ``tasks``: only records whose field ``task`` is one of these
    count, all where it is empty.
    """

    numerator: str
    denominator: str | None = None
    scale: float = 1.0
    exponential: bool = False
    tasks: tuple[str, ...] = ()

    def counted(self, records: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Those of the records that it is computed from."""
        return [record for record in records if record.get("task") in self.tasks] if self.tasks else records


@dataclass(frozen=True)
class ModelInfo:
    """Which model was evaluated; empty (``weights_hash`` "") for a suite that trains its own models from nothing.

    ``config_hash``: of the model's configuration. Landmarks, segments, the inverse's iterations or the rotary base
    change what the same weights compute. ``tokenizer_hash``: of the tokenizer, which decides what a token is.
    ``device``: the kind that computed, such as cpu or cuda; "" where it is not known.
    """

    weights_hash: str = ""
    run: str = ""
    objective: str = ""
    attention: str = ""
    parameters: int = 0
    tokens: int = 0
    config_hash: str = ""
    tokenizer_hash: str = ""
    device: str = ""

    @property
    def identity(self) -> list[str]:
        """All that determines what the model computes from a text."""
        return [self.weights_hash, self.config_hash, self.tokenizer_hash]


@dataclass(frozen=True)
class Outcome:
    """What a task computes, before it is dressed as a :class:`Result`.

    ``samples``: a few, to be looked at in the report. ``records``: one for every item that was scored, with plain
    numbers or text and an ``id`` that is a hash of the item: so the records of two models can be paired, and copies of
    an item are drawn together. They go to ``NAME.samples.jsonl``. ``estimators``: of the metrics that can be computed
    from the records.
    """

    metrics: dict[str, Metric]
    tables: list[Table] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    estimators: dict[str, Estimator] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One finished suite on one set of weights: what ``RUN/eval/<suite>.json`` holds.

    ``gate``: "passed", "forced" (it failed, and --force was given) or "none" (no checkpoint was looked at).
    ``records``: how many stand in the file of samples beside it, and the SHA-256 of that file. ``version``: of the
    task's code, 0 where the file does not say.
    """

    suite: str
    task: str
    key: str
    model: ModelInfo
    settings: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, Metric]
    tables: list[Table]
    series: list[Series]
    grids: list[Grid]
    samples: list[dict[str, Any]]
    estimators: dict[str, Estimator]
    records: dict[str, Any]
    gate: str
    seconds: float
    created: str
    environment: dict[str, Any]
    schema: int = SCHEMA
    version: int = 0

    def table(self, name: str) -> Table | None:
        """The table called ``name``, or None."""
        return next((table for table in self.tables if table.name == name), None)


def write_result(path: Path, result: Result) -> None:
    """Write atomically: a reader sees the old file or the whole new one. Numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encode_result(result), shared=True)


def encode_result(result: Result) -> bytes:
    """The content of a result's file."""
    raw = asdict(result)
    raw["metrics"] = {
        name: {k: v for k, v in metric.items() if v not in (None, "") or k in ("value", "higher_is_better")}
        for name, metric in raw["metrics"].items()
    }
    text = json.dumps(finite(raw), ensure_ascii=False, indent=1, allow_nan=False)
    return (text + "\n").encode()


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
        raw["grids"] = [Grid(**grid) for grid in raw["grids"]]
        raw["estimators"] = {
            name: Estimator(**{**item, "tasks": tuple(item.get("tasks", ()))})
            for name, item in raw["estimators"].items()
        }
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
    """What the numbers were computed with: versions, the code's commit, machine, threads."""
    import torch

    from pretrain.machine import code_version

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "nystrom-pretrain": _version("nystrom-pretrain"),
        "commit": code_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def finite(value: Any) -> Any:
    """``value`` with every number in it that is not finite as None, as JSON has no other word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
