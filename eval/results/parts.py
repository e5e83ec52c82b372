"""A suite's work in parts: each kept as soon as it is done, so that an interrupted suite goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomic

Job = tuple[str, Callable[[], Any]]


class Parts:
    """Runs named jobs, each once. The names must tell all that distinguishes the jobs of one suite.

    A job returns plain values (what JSON holds; tuples come back as lists, keys of dictionaries as text), and what the
    caller gets has always been through JSON, so that a part read back and one computed now are the same. With a
    ``folder`` every finished part is written there at once.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def map(self, jobs: Sequence[Job]) -> list[Any]:
        """The jobs' values, in their order."""
        names = [name for name, _ in jobs]
        assert len(set(names)) == len(names), f"parts of one name: {names}"
        return [self._value(name, work) for name, work in jobs]

    def one(self, name: str, work: Callable[[], Any]) -> Any:
        """A single job's value."""
        return self.map([(name, work)])[0]

    def _value(self, name: str, work: Callable[[], Any]) -> Any:
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json" if self.folder else None
        if path is not None:
            try:
                return json.loads(path.read_text(encoding="utf-8"))["value"]
            except (OSError, ValueError, KeyError, TypeError):
                pass  # not there, or half of a file that a crash left
        text = json.dumps({"name": name, "value": work()})
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
        return json.loads(text)["value"]
