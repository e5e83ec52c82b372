"""The folder that shards are prepared in: who may write there, and what is cleared away."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import TMP_SUFFIX, fsync_folder, write_atomic
from data_pipeline.moved import renamed
from data_pipeline.prepare.plan import Unit
from data_pipeline.prepare.worker import WORK
from data_pipeline.shards.manifest import FORMAT, MANIFEST_FILE
from data_pipeline.shards.writer import place_of, remove_files, unit_of
from data_pipeline.tokenization.tokenizer import TOKENIZER_FILES

__getattr__ = renamed(__name__, Part="JobPart")

BAD_FILE = "bad_records.jsonl"
DROPPED_FILE = "dropped_documents.jsonl"
_FIXED = (MANIFEST_FILE, *TOKENIZER_FILES, BAD_FILE, DROPPED_FILE)
PLAN, TOKENIZER = "plan.json", "tokenizer"  # in the work folder
_REPLACED = "replaced.json"


@dataclass(frozen=True)
class JobPart:
    """One of several jobs that share a folder; which units it does :class:`Deal` says."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UserError(
                f"shard index {self.index} of {self.count} shards: the index runs from 0 to one less than the number"
            )


@dataclass(frozen=True)
class Deal:
    """Which job of an array does what.

    Units go round the jobs. A divided unit that is larger than a job's fair share goes to as many jobs as it has
    shares, its parts in turn. Each of these jobs then reads all of it, so that more jobs would only read more.
    """

    count: int
    first: tuple[int, ...]  # for each unit the first of its jobs
    jobs: tuple[int, ...]  # and their number

    @classmethod
    def of(cls, units: Sequence[Unit], count: int) -> Deal:
        """Deal the units of a plan to ``count`` jobs."""
        sizes = [sum(piece.size for piece in unit.pieces) for unit in units]
        total = max(1, sum(sizes))
        jobs = [
            max(1, min(size * count // total, unit.about_parts)) if unit.divide else 1
            for unit, size in zip(units, sizes, strict=True)
        ]
        return cls(count, tuple(accumulate(jobs, initial=0))[:-1], tuple(jobs))

    def job(self, place: tuple[int, int]) -> int:
        """The job that does a unit's part."""
        unit, part = place
        if unit >= len(self.first):
            return unit % self.count
        return (self.first[unit] + part % self.jobs[unit]) % self.count

    def has(self, job: JobPart | None, unit: Unit) -> bool:
        """Whether a job does a unit, or a part of it; no job does all."""
        if job is None or not unit.divide:
            return job is None or self.job(unit.place) == job.index
        return any(self.job((unit.number, part)) == job.index for part in range(self.jobs[unit.number]))

    def idle(self) -> list[int]:
        """The jobs without anything to do."""
        busy = {self.job((unit, part)) for unit, jobs in enumerate(self.jobs) for part in range(jobs)}
        return sorted(set(range(self.count)) - busy)


def copy_prefix(part: JobPart | None) -> str:
    """How the names of the copies begin that a run makes of parts of divided units."""
    return "copy" if part is None else f"copy-{part.index}-of-{part.count}"


def occupied_error(folder: Path, by: str) -> UserError:
    """The error for a folder that holds something else."""
    return UserError(f"{folder} already holds {by}: choose another folder, or --overwrite to replace it")


def check_folder(folder: Path) -> None:
    """Raise :class:`UserError` unless the folder is new, empty or holds nothing but what this program wrote there.

    That is shards, the files that a manifest of shards lists, and what an unfinished run left.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder")
    if folder.is_dir():
        written = _written(folder)
        foreign = sorted(p.name for p in folder.iterdir() if not _ours(p.name, written))
        if foreign:  # never deleted, also not by --overwrite
            lost = any(unit_of(p.name) is not None for p in folder.iterdir()) and MANIFEST_FILE not in written
            raise UserError(
                f"{folder} holds {'shards without a manifest, and ' if lost else ''}files that are not shards "
                f"({foreign[0]}): choose an empty or new folder, or move them away"
            )


_TEMPORARY = re.compile(rf"(?:{'|'.join(map(re.escape, _FIXED))})(?:\.[0-9a-f]{{8}})?{re.escape(TMP_SUFFIX)}")


def _ours(name: str, written: Collection[str]) -> bool:
    return name == WORK or name in written or unit_of(name) is not None or _TEMPORARY.fullmatch(name) is not None


def _written(folder: Path) -> set[str]:
    """Which of the files with fixed names this program wrote: a user's tokenizer or manifest has the same names."""
    listed = _listed(folder)
    names = set() if listed is None else {MANIFEST_FILE, *listed}
    work = folder / WORK
    with suppress(FileNotFoundError, ValueError):
        names |= set(json.loads((work / _REPLACED).read_bytes()))
    if (work / PLAN).is_file():  # a run died just before its manifest
        names |= {BAD_FILE, DROPPED_FILE}
        names |= {name for name in TOKENIZER_FILES if _same(folder / name, work / TOKENIZER / name)}
    return names


def _listed(folder: Path) -> set[str] | None:
    """The files with fixed names that the folder's manifest of shards lists, None without such a manifest."""
    try:
        data = json.loads((folder / MANIFEST_FILE).read_bytes())
        if data["format"] != FORMAT:
            return None
        return {entry["name"] for key in ("tokenizer", "reports") for entry in data[key]} & set(_FIXED)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError:
        return False


@contextmanager
def lock_folder(folder: Path, part: JobPart | None) -> Iterator[Path]:
    """The work folder, held by one whole run or by several parts of one, each part once.

    The lock goes with the process, also when it is killed. On a network file system it needs one that supports
    ``flock`` (NFS 4, Lustre with ``-o flock``).
    """
    work = folder / WORK
    held: list[int] = []
    try:
        try:
            work.mkdir(parents=True, exist_ok=True)
            held.append(_open(work / "lock"))
            if part is not None:
                held.append(_open(work / f"lock-{part.index}-of-{part.count}"))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None
        kind = fcntl.LOCK_EX if part is None else fcntl.LOCK_SH
        _acquire(folder, held[0], kind, f"another process is preparing {folder}")
        if part is not None:
            _acquire(folder, held[1], fcntl.LOCK_EX, f"another process is preparing part {part.index} of {folder}")
        yield work
    finally:
        for lock in held:
            os.close(lock)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _acquire(folder: Path, lock: int, kind: int, refusal: str) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{refusal} right now") from None
    except OSError as error:
        raise UserError(
            f"{folder} cannot be locked ({error.strerror}): its file system has no flock; mount it with locks (Lustre: "
            "-o flock), or prepare on another one and copy the finished folder"
        ) from None


def start_run(folder: Path, work: Path, purpose: str, *, overwrite: bool, part: JobPart | None, deal: Deal) -> None:
    """Clear what does not belong to this run and leave its purpose in the work folder.

    Raises :class:`UserError` for a folder in which another run is unfinished, unless ``overwrite``. A whole run may
    take the place of one that has finished nothing: mostly that was a mistake in the command.
    """
    plan = work / PLAN
    try:
        same = json.loads(plan.read_bytes())["purpose"] == purpose
        found = "an unfinished run with other inputs, another tokenizer or other settings"
        known = True
    except (FileNotFoundError, ValueError):
        same, found = False, "shards without a manifest"
        known = any(unit_of(p.name) is not None for p in folder.iterdir())
    if known and not same and not overwrite and (part is not None or _begun(folder, work)):
        raise occupied_error(folder, found)
    if part is not None:
        if not same:
            write_atomic(plan, _json({"purpose": purpose}), shared=True)
        stale = [p.name for p in folder.iterdir() if p.name.endswith(TMP_SUFFIX)]
        remove_files(folder, [name for name in stale if deal.job(place_of(name) or (0, 0)) == part.index])
        copies = f"{copy_prefix(part)}-"
        remove_files(work, [p.name for p in work.iterdir() if p.name.startswith(copies)])
        return
    if not same or (folder / MANIFEST_FILE).exists():
        listed = _listed(folder)
        if listed is not None:  # what may go, should this run die between here and the plan
            write_atomic(work / _REPLACED, _json(sorted(listed)))
        remove_files(folder, [MANIFEST_FILE])  # first: without it nothing here counts as complete
        fsync_folder(folder)
        kept = ("lock", _REPLACED)
        remove_files(work, [p.name for p in work.iterdir() if p.is_file() and not p.name.startswith(kept)])
        remove_files(folder, [p.name for p in folder.iterdir() if unit_of(p.name) is not None])
        remove_files(folder, [*TOKENIZER_FILES, BAD_FILE, DROPPED_FILE])  # ours, as `check_folder` has seen
        write_atomic(plan, _json({"purpose": purpose}))
        remove_files(work, [_REPLACED])
    for place in (folder, work):
        remove_files(place, [p.name for p in place.iterdir() if p.name.endswith(TMP_SUFFIX)])


def _begun(folder: Path, work: Path) -> bool:
    """Whether a run left work there that would be lost: shards, records of units, signatures."""
    names = (path.name for path in work.iterdir() if path.is_file() and not path.name.endswith(TMP_SUFFIX))
    left = [name for name in names if name not in (PLAN, _REPLACED) and not name.startswith("lock")]
    return bool(left) or any(unit_of(path.name) is not None for path in folder.iterdir())


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
