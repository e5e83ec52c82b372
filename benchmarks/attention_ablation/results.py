"""The file of results: every finished run under a key of all that determines it, so that none is run again."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic

SCHEMA = 1
VERSION = 1
"""Raised when the numbers of a run change though its settings do not: then nothing old is taken for done."""

Record = dict[str, Any]


def key(**parts: Any) -> str:
    """sha256 of the parts (plain values)."""
    return hashlib.sha256(json.dumps({"version": VERSION, **parts}, sort_keys=True).encode()).hexdigest()


class Results:
    """``runs`` and ``timings`` by key; the file is written anew, as a whole, with each addition."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`UserError` for a file that is there and is not one of these."""
        self.path = path
        self.runs: dict[str, Record] = {}
        self.timings: dict[str, Record] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is not a readable file of results ({error}): delete it or choose another --out"
            ) from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA or not {"runs", "timings"} <= set(content):
            raise UserError(f"{path} holds no results of this benchmark (schema {SCHEMA}): choose another --out")
        self.runs, self.timings = content["runs"], content["timings"]

    def add_run(self, key: str, record: Record) -> None:
        """Keep a finished run."""
        self.runs[key] = _finite(record)
        self._write()

    def add_timing(self, key: str, record: Record) -> None:
        """Keep a finished timing."""
        self.timings[key] = _finite(record)
        self._write()

    def _write(self) -> None:
        content = {"schema": SCHEMA, "runs": self.runs, "timings": self.timings}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    """Numbers that are not finite become null: JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
