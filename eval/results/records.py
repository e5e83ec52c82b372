"""Where results lie, and the records of single samples beside them: JSON lines, whose checksum the result holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from eval.results.schema import Result, finite, read_result

RESULT, SAMPLES = "result.json", "samples.jsonl"
FINISHED = "finished"


def encode_records(records: Sequence[dict[str, Any]]) -> tuple[bytes, dict[str, Any]]:
    """The lines, and what the result says about them. Numbers that are not finite become null."""
    lines = [json.dumps(finite(record), ensure_ascii=False, sort_keys=True, allow_nan=False) for record in records]
    data = "".join(line + "\n" for line in lines).encode()
    return data, {"count": len(lines), "sha256": hashlib.sha256(data).hexdigest()}


def results_folder(checkpoint: Path, run_dir: Path | None) -> Path:
    """RUN/eval for a run and its export; RUN/eval/NAME for a checkpoint or the averaged weights (export-ema), so that
    the run's results stay."""
    if run_dir is None:
        return checkpoint / "eval"
    place = checkpoint.resolve()
    own = {run_dir.resolve(), run_dir.resolve() / "export", run_dir.resolve() / "checkpoints"}
    return run_dir / "eval" / ("" if place in own or checkpoint.name == "latest" else place.name)


def finished_folder(folder: Path, key: str) -> Path:
    """Where the results folder keeps the result of this key."""
    return folder / FINISHED / key[:32]


def samples_path(result: Path) -> Path:
    """The records' file beside a result's."""
    return result.with_name(SAMPLES if result.name == RESULT else f"{result.stem}.{SAMPLES}")


def checked_lines(path: Path, result: Result) -> bytes | None:
    """The records' file of the result at ``path`` as bytes; None if it is not there or not the one that it names."""
    if not result.records["count"]:
        return b""
    try:
        data = samples_path(path).read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == result.records["sha256"] else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of the result file ``path``, verified against it; none where it has none.

    They stand beside it, or (while another evaluation is replacing both files) with the finished results of its folder.
    Raises :class:`UserError` for files that are missing or damaged.
    """
    path = Path(path)
    result = read_result(path)
    data = checked_lines(path, result)
    if data is None and path.name != RESULT:
        data = checked_lines(finished_folder(path.parent, result.key) / RESULT, result)
    if data is None:
        beside = samples_path(path)
        what = "does not hold the records that the result names" if beside.exists() else "is missing"
        raise UserError(f"{beside} {what} (records of {path}): evaluate again with --rerun")
    try:
        records = [json.loads(line) for line in data.decode().split("\n")[:-1]]
    except ValueError as error:
        raise UserError(f"{samples_path(path)} is not JSON lines ({error}): evaluate again with --rerun") from None
    if len(records) != result.records["count"] or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{samples_path(path)} has {len(records)} records, {path} names {result.records['count']}")
    return records
