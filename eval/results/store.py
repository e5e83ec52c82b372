"""Where results lie, and the rule that the same result is never computed twice.

A result is keyed by what determines it: the weights, the task with its settings, the data, and the version of the code
that computes it. A file that holds a finished result of the same key is returned as it is; any other is replaced,
atomically, so that a killed evaluation leaves either the old result or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomic
from eval.results.parts import Parts
from eval.results.schema import (
    SCHEMA,
    ModelInfo,
    Outcome,
    Result,
    environment,
    read_result_or_none,
    write_result,
)

UNFINISHED = ".unfinished"
SAMPLES_SUFFIX = ".samples.jsonl"


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
) -> tuple[Result, bool]:
    """Return the finished result ``folder``/``suite``.json if its key is this one, else compute and write it.

    ``data`` must have a ``hash``. The second value tells whether it was computed now. Parts of a suite that was
    interrupted lie in ``folder``/.unfinished/KEY and are taken up again.
    """
    path = folder / f"{suite}.json"
    key = result_key(task, version, model.weights_hash, settings, data["hash"])
    unfinished = folder / UNFINISHED / key[:32]
    if rerun:
        shutil.rmtree(unfinished, ignore_errors=True)
    else:
        old = read_result_or_none(path)
        if old is not None and old.key == key:
            return old, False
    started = time.perf_counter()
    outcome = compute(Parts(unfinished))
    lines = "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in outcome.records)
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
        records={"count": len(outcome.records), "sha256": hashlib.sha256(lines.encode()).hexdigest()},
        gate=gate,
        seconds=round(time.perf_counter() - started, 3),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    if outcome.records:
        write_atomic(folder / f"{suite}{SAMPLES_SUFFIX}", lines.encode())
    write_result(path, result)
    shutil.rmtree(unfinished, ignore_errors=True)
    with contextlib.suppress(OSError):  # another suite's parts lie in it
        unfinished.parent.rmdir()
    return result, True
