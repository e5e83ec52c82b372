"""What a run's own files say about a model, for its card: data, evaluation results, the gate's verdict, software.

Everything here may be missing: an export that was copied away has no run around it. What is missing is None or empty,
never a guess. Results are read as plain JSON, because this folder may not import ``eval``. Of a result file
(``RUN/eval/SUITE.json``, schema 2, documented in ``eval/results/schema.py``) these keys are read:

    schema    2; other files are passed over
    suite, task, created, data, settings
    model     weights_hash, config_hash, tokenizer_hash: a result counts only if all three are those of the model
    gate      "passed", "forced" (it failed, and --force was given) or "none"
    metrics   name -> value, and where there are some low and high (95% interval), std, n, unit
    tables    of the validity gate: the table "checks" with the columns check, measured, bound, passed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.shards.manifest import Manifest, read_manifest
from pretrain.checkpoint.load import LoadedModel

SCHEMA = 2
GATE = "validity"
FINISHED = "finished"
"""Folder with every result that was ever computed, below the one that has the last of each suite."""


@dataclass(frozen=True)
class SourceRecord:
    """A source of training text. ``manifest`` is None where the shards are not there, or others lie in their place."""

    name: str
    weight: float
    manifest: Manifest | None


@dataclass(frozen=True)
class Verdict:
    """What the validity gate measured on these weights."""

    passed: bool
    checks: int
    failures: tuple[str, ...]  # each with the measured value and the bound
    created: str


@dataclass(frozen=True)
class RunRecord:
    """All of it."""

    sources: tuple[SourceRecord, ...]
    held_out: SourceRecord | None  # the shards of data.valid, if the run names some
    results: tuple[dict[str, Any], ...]  # of these weights, without the gate's; language modeling first
    other_results: tuple[str, ...]  # suites whose files are of other weights, or of other settings of the model
    verdict: Verdict | None  # None: the gate has not looked at these weights
    environment: dict[str, Any]  # of the last start
    starts: int
    init_from: dict[str, Any]  # init_from.json
    validation: dict[str, Any]  # the last line of validation at these tokens


def read_record(loaded: LoadedModel) -> RunRecord:
    """Everything that can be found about ``loaded``: beside it, in its run, and in the shards that the run names."""
    run = loaded.run_dir
    environment = _json(run / "environment.json") if run else {}
    found = [result for folder in _result_folders(loaded) for result in _results(folder)]
    own = [result for _, result in found if _is_of(result, loaded)]
    # What was last asked for under a suite's name counts before what is only kept, then the newest.
    shown = sorted(found, key=lambda item: (item[0], str(item[1].get("created"))))
    # A result without weights is of models that its suite trained from nothing.
    others = [r for _, r in found if r["task"] != GATE and r["model"].get("weights_hash")]
    newest: dict[str, dict[str, Any]] = {}
    for _, result in shown:
        if result["task"] != GATE and _is_of(result, loaded):
            newest[result["suite"]] = result
    verdicts = [result for result in own if result["task"] == GATE]
    return RunRecord(
        sources=tuple(_sources(loaded, environment)),
        held_out=_held_out(loaded, environment),
        results=tuple(newest[name] for name in sorted(newest, key=lambda name: (name != "lm", name))),
        other_results=tuple(sorted({r["suite"] for r in others} - set(newest))),
        verdict=_verdict(max(verdicts, key=lambda r: str(r.get("created")))) if verdicts else None,
        environment=environment,
        starts=len(_lines(run / "starts.jsonl")) if run else 0,
        init_from=_json(run / "init_from.json") if run else {},
        validation=_validation(run, loaded.tokens) if run else {},
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; a last line that was cut off is left out."""
    out = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in out if isinstance(line, dict)]


def _validation(run: Path, tokens: int) -> dict[str, Any]:
    lines = (line for line in _lines(run / "metrics.jsonl") if line.get("kind") == "valid")
    at = [line for line in lines if line.get("tokens") == tokens]
    return at[-1] if at else {}


def _result_folders(loaded: LoadedModel) -> list[Path]:
    """Where results of the model may lie: its run's, and its own."""
    folders = [loaded.path / "eval"]
    if loaded.run_dir is not None and loaded.run_dir / "eval" not in folders:
        folders.append(loaded.run_dir / "eval")
    return [folder for folder in folders if folder.is_dir()]


def _results(folder: Path) -> Iterator[tuple[bool, dict[str, Any]]]:
    """The results below a folder, of whichever weights, each with whether people see it under its suite's name."""
    for path in sorted(folder.rglob("*.json")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # parts of an evaluation that is not finished
        raw = _json(path)
        shaped = isinstance(raw.get("model"), dict) and isinstance(raw.get("metrics"), dict)
        if raw.get("schema") == SCHEMA and shaped and isinstance(raw.get("suite"), str) and "task" in raw:
            yield FINISHED not in path.relative_to(folder).parts, raw


def _is_of(result: dict[str, Any], loaded: LoadedModel) -> bool:
    model = result["model"]
    config_hash = hashlib.sha256(loaded.model_config.model_dump_json().encode()).hexdigest()
    identity = [loaded.weights_hash, config_hash, loaded.tokenizer.hash]
    return [model.get("weights_hash"), model.get("config_hash"), model.get("tokenizer_hash")] == identity


def _verdict(result: dict[str, Any]) -> Verdict | None:
    passed = result["metrics"].get("passed", {})
    if passed.get("value") not in (0, 1):
        return None
    table: dict[str, Any] = next((t for t in result.get("tables", ()) if t.get("name") == "checks"), {"rows": []})
    failures = tuple(f"{row[0]}: {_short(row[1])}, must be {row[2]}" for row in table["rows"] if not row[3])
    return Verdict(passed["value"] == 1, int(passed.get("n") or 0), failures, str(result.get("created", "")))


def _short(measured: Any) -> str:
    return f"{measured:.3g}" if isinstance(measured, int | float) else "not a number"


def _sources(loaded: LoadedModel, environment: dict[str, Any]) -> Iterator[SourceRecord]:
    """The sources of ``data.train``, each with the manifest of its shards if those are still what was trained on."""
    data = loaded.run_config.data
    # Of one source read as a stream, a checkpoint keeps the fingerprint of the shards themselves.
    trained_on = _fingerprint(loaded, "data") if len(data.sources) == 1 and data.packing == "stream" else None
    for source in data.sources:
        manifest = _manifest(source.path, loaded, environment, trained_on)
        yield SourceRecord(source.name, source.weight, manifest)


def _held_out(loaded: LoadedModel, environment: dict[str, Any]) -> SourceRecord | None:
    path = loaded.run_config.data.valid
    if path is None:
        return None
    manifest = _manifest(path, loaded, environment, _fingerprint(loaded, "valid"))
    return SourceRecord(Path(path).name, 0.0, manifest)


def _manifest(path: str, loaded: LoadedModel, environment: dict[str, Any], fingerprint: str | None) -> Manifest | None:
    """The manifest at a path that is relative to the working directory of the training, or to this process's.

    None where there is none, or where it is of another tokenizer or has another fingerprint.
    """
    started_in = environment.get("working_directory")
    for base in [Path(started_in), Path()] if isinstance(started_in, str) else [Path()]:
        try:
            manifest = read_manifest(base / path)
        except UserError:
            continue
        if manifest.tokenizer_hash == loaded.tokenizer.hash and fingerprint in (None, manifest.fingerprint):
            return manifest
    return None


def _fingerprint(loaded: LoadedModel, which: str) -> str | None:
    """What a checkpoint of the run says of its ``data`` or ``valid``; every one of a run says the same of the first."""
    run = loaded.run_dir
    for path in sorted((run / "checkpoints").glob("*/manifest.json"), reverse=True) if run else ():
        identity = _json(path).get("identity")
        if isinstance(identity, dict) and isinstance(identity.get(f"{which}_fingerprint"), str):
            return str(identity[f"{which}_fingerprint"])
    return None
