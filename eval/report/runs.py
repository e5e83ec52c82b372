"""Reading a run folder for the report, forgiving what a killed run leaves behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from eval.results.schema import Result, read_result


@dataclass(frozen=True)
class Stage:
    """A stretch of the run at one sequence length, in tokens of the run."""

    start: float
    end: float
    seq_len: int


@dataclass
class Run:
    """What a run folder holds, as far as it is there; ``problems`` says in words what could not be read."""

    path: Path
    name: str
    config: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

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
    """Read a run folder; raises :class:`UserError` for a folder with neither configuration nor metrics of a run."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"run folder {path} does not exist")
    if not any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(f"{path} is not a run folder: it has neither config.yaml nor metrics.jsonl")
    run = Run(path, path.resolve().name, _read_config(path / "config.yaml"))
    run.name = str(run.config.get("name") or run.name)
    _read_metrics(run, path / "metrics.jsonl")
    _read_results(run, path / "eval")
    try:
        run.environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        run.problems.append(f"environment.json cannot be read: {error}")
    return run


def read_runs(paths: list[str]) -> list[Run]:
    """Read several runs; names that occur twice are replaced by the folders' paths."""
    runs = [read_run(path) for path in dict.fromkeys(paths)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)
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


def _read_results(run: Run, folder: Path) -> None:
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            run.results[file.stem] = read_result(file)
        except UserError as error:
            run.problems.append(str(error))
    hashes = {result.model.weights_hash for result in run.results.values()}
    if len(hashes) > 1:
        run.problems.append(
            "the evaluation results are of different weights of this run: evaluate again to bring them level"
        )
