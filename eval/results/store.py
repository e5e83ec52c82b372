"""Where results lie, and the rule that the same result is never computed twice.

A result is keyed by what determines it: the model (weights, configuration, tokenizer), the task with its settings, the
data, and what computes it: a hash of the code (:mod:`eval.results.code`), torch's version, the kind of device. In a
results folder,

    finished/KEY/result.json, samples.jsonl   every finished result, under the beginning of its key
    SUITE.json, SUITE.samples.jsonl           the one that was last asked for under this name: what people read
    .unfinished/KEY/                          parts of suites that were interrupted

Records are written before the result that names their checksum, each file whole under its name or not at all. So a
killed evaluation leaves the old or the new and never something that passes for either. What determines a result does
not include the validity gate: its verdict on the weights is asked before a result is looked for, and a stored result is
handed out with the verdict of today.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import TMP_SUFFIX, write_atomic
from eval.results.code import changes, provenance
from eval.results.parts import Parts
from eval.results.records import (
    FINISHED,
    RESULT,
    checked_lines,
    encode_records,
    finished_folder,
    samples_path,
)
from eval.results.schema import (
    SCHEMA,
    ModelInfo,
    Outcome,
    Result,
    encode_result,
    environment,
    read_result_or_none,
    write_result,
)
from eval.team import Team

UNFINISHED = ".unfinished"
KEEP_UNFINISHED_DAYS = 30
"""Parts of a suite that nobody resumed for so long are removed: its settings, data or code have changed since."""


def result_key(
    task: str,
    version: int,
    model: ModelInfo,
    settings: dict[str, Any],
    data_hash: str,
    made_by: dict[str, str] | None = None,
) -> str:
    """The sha256 of all that determines a result.

    ``version`` is the task's own, raised when its numbers change. ``made_by``: what computes it, default the
    :func:`eval.results.code.provenance` of the task in this process.
    """
    parts = {
        "schema": SCHEMA,
        "made_by": provenance(task, model.device) if made_by is None else made_by,
        "task": task,
        "version": version,
        "model": model.identity,
        "settings": settings,
        "data": data_hash,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def obtain(
    folder: Path,
    suite: str,
    *,
    task: str,
    version: int,
    model: ModelInfo,
    settings: dict[str, Any],
    data: dict[str, Any],
    gate: str,
    compute: Callable[[Parts], Outcome],
    rerun: bool = False,
    team: Team | None = None,
) -> tuple[Result, bool]:
    """Return the finished result of this key if ``folder`` has it, else compute it; ``folder``/``suite``.json holds it.

    ``data`` must have a ``hash``. The second value tells whether it was computed now. With several processes in
    ``team`` all call this; the first looks, and writes, for all. Raises :class:`UserError` where the folder cannot be
    written or the processes do not see the same weights, settings and data.
    """
    team = team or Team()
    made_by = provenance(task, model.device)
    key = result_key(task, version, model, settings, data["hash"], made_by)
    keys = team.gather(key)
    if len(set(keys)) > 1:
        other = next(rank for rank, found in enumerate(keys) if found != keys[0])
        raise UserError(f"{suite}: process {other} sees other weights, settings, data or code than process 0: are the "
                        "files the same on all machines? If their processors are not, give a --precision")  # fmt: skip
    unfinished = folder / UNFINISHED / key[:32]
    own, path = finished_folder(folder, key) / RESULT, folder / f"{suite}.json"

    def look() -> Result | None:
        if rerun:
            shutil.rmtree(unfinished, ignore_errors=True)
            return None
        found = _stored(folder, suite, key)
        if found is None:
            return None
        result, lines, place = replace(found[0], suite=suite, gate=gate), found[1], found[2]
        missing = [path] if not _holds(path, result) else []
        _keep(folder, result, lines, missing if place == own else [own, *missing])
        return result

    old = team.first(look)
    if old is not None:
        return old, False
    if team.is_first and not rerun:
        why = _outlived(folder, suite, task, model, settings, data["hash"], made_by)
        if why:
            print(f"{suite}: computed again, since the result that is there does not stand: {why}", flush=True)
    started = time.perf_counter()
    outcome = compute(Parts(unfinished, team))

    def finish() -> Result:
        lines, about = encode_records(outcome.records)
        result = Result(
            suite=suite,
            task=task,
            key=key,
            model=model,
            settings=settings,
            data=data,
            metrics=outcome.metrics,
            tables=outcome.tables,
            series=outcome.series,
            grids=outcome.grids,
            samples=outcome.samples,
            estimators=outcome.estimators,
            records=about,
            gate=gate,
            seconds=round(time.perf_counter() - started, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=environment()
            | {"processes": team.size, "code": made_by["code"], "device_kind": made_by["device"]},
            version=version,
        )
        _keep(folder, result, lines, [own, path])
        shutil.rmtree(unfinished, ignore_errors=True)
        remove_leftovers(folder)
        return result

    return team.first(finish), True


def remove_leftovers(folder: Path, now: float | None = None) -> None:
    """Remove parts and temporary files that nobody has touched for :data:`KEEP_UNFINISHED_DAYS`."""
    oldest = (time.time() if now is None else now) - KEEP_UNFINISHED_DAYS * 86400
    for path in [*folder.glob(f"{UNFINISHED}/*"), *folder.rglob(f"*{TMP_SUFFIX}")]:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    with contextlib.suppress(OSError):  # not empty, or not there
        (folder / UNFINISHED).rmdir()


def _stored(folder: Path, suite: str, key: str) -> tuple[Result, bytes, Path] | None:
    """The whole result of this key, its records, and where it was; some folders have only the second place."""
    for path in (finished_folder(folder, key) / RESULT, folder / f"{suite}.json"):
        result = read_result_or_none(path)
        if result is not None and result.key == key:
            lines = checked_lines(path, result)
            if lines is not None:
                return result, lines, path
    return None


def _outlived(
    folder: Path,
    suite: str,
    task: str,
    model: ModelInfo,
    settings: dict[str, Any],
    data_hash: str,
    made_by: dict[str, str],
) -> str:
    """Why the newest result of these inputs is not served, "" where there is none: other code, torch or device."""
    asked = (task, model.identity, settings, data_hash)
    found = [
        result
        for path in (folder / f"{suite}.json", *folder.glob(f"{FINISHED}/*/{RESULT}"))
        if (result := read_result_or_none(path)) is not None
        and (result.task, result.model.identity, result.settings, result.data.get("hash")) == asked
    ]
    if not found:
        return ""
    return "; ".join(changes(max(found, key=lambda result: result.created).environment, made_by))


def _keep(folder: Path, result: Result, lines: bytes, places: list[Path]) -> None:
    """Write a result with its records to these places, the records first."""
    if not places:
        return
    try:
        with _locked(folder):
            for place in places:
                place.parent.mkdir(parents=True, exist_ok=True)
                if lines:
                    write_atomic(samples_path(place), lines, shared=True)
                write_result(place, result)
                if not lines:
                    samples_path(place).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"result {result.suite} cannot be written to {folder}: {error.strerror or error}") from None


def _holds(path: Path, result: Result) -> bool:
    """Whether these very bytes stand there: a folder that may only be read serves what it has."""
    try:
        return path.read_bytes() == encode_result(result) and checked_lines(path, result) is not None
    except OSError:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One evaluation at a time replaces a result and its records, or one's records would stand beside the other's."""
    lock = folder / FINISHED / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks: readers then see damage, and say so
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
