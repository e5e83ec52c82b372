"""A suite's work in parts: each kept as soon as it is done, divided over the processes of the evaluation.

A suite that was interrupted, between two parts or within one, resumes with the parts that are missing, also on another
number of processes. A part is a file of two lines, what it is and its value, with the checksum of the second in the
first; one that does not hold together is computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from eval.team import Mistake, Team

Job = tuple[str, Callable[[], Any]]
_ATTEMPTS = 3


class Parts:
    """Runs named jobs, each once. The names must tell all that distinguishes the jobs of one suite.

    A job returns plain values (what JSON holds; tuples come back as lists, keys of dictionaries as text), and what the
    caller gets has always been through JSON, so that a part read back and one computed now are the same. With a
    ``folder`` every finished part is written there at once. A job must seed itself and leave nothing behind: which
    process runs it, and after which others, is not known.
    """

    def __init__(self, folder: Path | None = None, team: Team | None = None) -> None:
        self.folder = folder
        self.team = team or Team()

    def map(self, jobs: Sequence[Job]) -> list[Any]:
        """The jobs' values, in their order, on every process.

        What the first process finds in the folder is not run; of the rest, process r takes the jobs r, r + world size
        and so on. Raises the :class:`UserError` of the first job that has one, on every process, after each has ended
        its share or met one.
        """
        names = [name for name, _ in jobs]
        assert len(set(names)) == len(names), f"parts of one name: {names}"
        known = self.team.first(lambda: self._known(names))
        missing = [index for index in range(len(jobs)) if index not in known]
        if known and missing and self.team.is_first:
            print(f"{len(known)} of {len(jobs)} parts are there already", flush=True)
        computed: dict[int, str] = {}
        mistake: Mistake | None = None
        for index in missing[self.team.rank :: self.team.size]:
            self.team.at(f"computing {names[index]}")
            try:
                computed[index] = self._compute(names[index], jobs[index][1])
            except UserError as error:
                if self.team.size == 1:
                    raise
                mistake = (index, str(error))
                break
        self.team.at("waiting for the parts of the others")
        for share in self.team.gather(computed, mistake):
            known |= share
        return [json.loads(known[index]) for index in range(len(jobs))]

    def share(self, jobs: Sequence[Job]) -> list[str]:
        """Names of the jobs that :meth:`map` would run in this process now, for estimates of the time that is left."""
        names = [name for name, _ in jobs]
        known = self._known(names)
        missing = [name for index, name in enumerate(names) if index not in known]
        return missing[self.team.rank :: self.team.size]

    def one(self, name: str, work: Callable[[], Any]) -> Any:
        """A single job's value: the first process computes it while the others wait."""
        return self.map([(name, work)])[0]

    def _known(self, names: Sequence[str]) -> dict[int, str]:
        """JSON of the parts in the folder, by number."""
        if self.folder is None or not self.folder.is_dir():
            return {}
        found = ((index, read_part(part_path(self.folder, name), name)) for index, name in enumerate(names))
        return {index: text for index, text in found if text is not None}

    def _compute(self, name: str, work: Callable[[], Any]) -> str:
        text = json.dumps(work())
        if self.folder is not None:
            write_part(part_path(self.folder, name), name, text)
        return text


def part_path(folder: Path, name: str) -> Path:
    """The file of a part."""
    return folder / f"{_digest(name)[:32]}.json"


def read_part(path: Path, name: str) -> str | None:
    """The JSON of the part's value; None where the file is not there, is another part's, or is damaged."""
    try:
        head, text, rest = path.read_text(encoding="utf-8").split("\n")
        about = json.loads(head)
        whole = not rest and about["name"] == name and about["sha256"] == _digest(text)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if whole else None


def write_part(path: Path, name: str, text: str) -> None:
    """Keep a part, atomically; raises :class:`UserError` where that is not possible.

    Another evaluation of the same key may have finished, and removed the folder, at any moment.
    """
    content = f"{json.dumps({'name': name, 'sha256': _digest(text)})}\n{text}\n".encode()
    for attempt in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content, shared=True)
            return
        except FileNotFoundError:
            if attempt + 1 == _ATTEMPTS:
                raise UserError(f"{path.parent} disappears while parts are written to it") from None
        except OSError as error:
            raise UserError(
                f"part {name} cannot be kept in {path.parent}: {error.strerror or error}; make room, and the same "
                "command resumes with the parts that are missing"
            ) from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
