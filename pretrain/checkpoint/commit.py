"""What makes a folder of files a checkpoint: a manifest with checksums, written last.

DeepSpeed's own ``save_checkpoint`` moves its pointer before all processes have written (0.19.8, stages 1 and 2), so
that a kill in between leaves it on a torn checkpoint. Here each process fsyncs the files that it wrote, and the folder.
After a barrier ``manifest.json`` is written, by rename and fsync of the folder: every file's size and XXH3-128, and the
training state. An fsync of the folder above makes the checkpoint's name durable. Only then is an older one removed, its
manifest first. A folder without a manifest that checks out is no checkpoint. ``latest`` names the last one for people
and scripts; nothing here reads it. This module knows files only; ``pretrain.checkpoint.store`` uses it in step with the
other processes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.files import FileEntry, fsync_folder, hash_file, write_atomic

MANIFEST = "manifest.json"
LATEST = "latest"
SCHEMA = 1


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. Everything else follows from the configuration and the weights."""

    step: int = 0  # optimizer steps, skipped ones included
    tokens: int = 0  # consumed, by all processes
    bad_steps: int = 0  # skipped because loss or gradient was not finite
    bad_in_row: int = 0
    validated_tokens: int = 0  # position of the last complete validation
    seconds: float = 0.0  # spent in the training loop, over all starts
    losses: tuple[float, ...] = ()  # of the last steps, with which the next ones are compared

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(self.losses))  # JSON has lists


@dataclass(frozen=True)
class Manifest:
    """The marker of a whole checkpoint."""

    tag: str
    state: TrainState
    identity: dict[str, Any]  # what a resume compares: configuration, data fingerprint, number of processes
    files: dict[str, FileEntry]
    created: float = field(default_factory=time.time)

    def to_bytes(self) -> bytes:
        """The file's contents, a checksum of itself included."""
        files = {name: {"bytes": entry.bytes, "xxh3_128": entry.xxh3_128} for name, entry in self.files.items()}
        body = {"schema": SCHEMA, **asdict(replace(self, files={})), "files": files}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``folder/manifest.json``; raises ``ValueError`` that says what is wrong with it."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError("it has no manifest: the save did not finish")
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum")
            if checksum != _checksum(body) or body.pop("schema") != SCHEMA:
                raise ValueError("its manifest is damaged")
            files = {name: FileEntry(name, **entry) for name, entry in body.pop("files").items()}
            return cls(**{**body, "files": files, "state": TrainState(**body["state"])})
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError("its manifest is damaged") from None


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def tag_name(step: int) -> str:
    """Folder name of the checkpoint of a step; names sort like steps."""
    return f"step{step:09d}"


def data_files(folder: Path) -> list[str]:
    """Names of all files of a checkpoint folder except its manifest, relative to it, sorted."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if not name.startswith(MANIFEST))


def fsync_files(folder: Path, names: Iterable[str]) -> None:
    """Make files and the names they have in ``folder`` durable."""
    for name in names:
        fd = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    fsync_folder(folder)


def problem_with(folder: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """What is wrong with these files of a checkpoint, or None. Reads them whole."""
    for name in names:
        try:
            found = hash_file(folder, name)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        expected = manifest.files[name]
        if found.bytes != expected.bytes:
            return f"{name} has {found.bytes} bytes, the manifest says {expected.bytes}"
        if found.xxh3_128 != expected.xxh3_128:
            return f"{name} does not match its checksum"
    return None


def make_folder(folder: Path) -> None:
    """Create ``folder`` and those above it that are missing, each with a durable name."""
    missing = [folder, *folder.parents]
    missing = missing[: next((i for i, path in enumerate(missing) if path.is_dir()), len(missing))]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def commit(root: Path, manifest: Manifest) -> None:
    """Declare ``root/tag`` a checkpoint. Its files must be durable already; so is the checkpoint on return."""
    write_atomic(root / manifest.tag / MANIFEST, manifest.to_bytes())
    fsync_folder(root)


def write_latest(root: Path, tag: str) -> None:
    """Have ``latest`` name this checkpoint."""
    write_atomic(root / LATEST, tag.encode())


def remove(folder: Path) -> None:
    """Remove a checkpoint, its marker first: what a removal cut short leaves must not look whole, ever."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        manifest.unlink()
        fsync_folder(folder)
    if folder.is_dir():
        shutil.rmtree(folder)


def candidates(root: Path) -> Iterator[tuple[Path, Manifest | str]]:
    """Checkpoint folders below ``root`` from the newest to the oldest, each with its manifest or what is wrong with it.

    Only manifests and sizes are looked at, so this is quick; :func:`problem_with` reads the contents.
    """
    folders = [p for p in root.glob("step*") if p.is_dir()] if root.is_dir() else []
    for folder in sorted(folders, reverse=True):
        try:
            manifest = Manifest.read(folder)
            yield folder, _size_problem(folder, manifest) or manifest
        except ValueError as error:
            yield folder, str(error)


def _size_problem(folder: Path, manifest: Manifest) -> str | None:
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {entry.bytes}"
    return None


def newest(root: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint below ``root`` whose manifest and file sizes are right, or None."""
    for folder, manifest in candidates(root):
        if isinstance(manifest, Manifest):
            return folder, manifest
    return None


def kept(tokens: Sequence[int], keep_last: int, keep_every_tokens: int | None) -> set[int]:
    """Which of the checkpoints at these positions stay: the ``keep_last`` highest, and the first at or after each
    multiple of ``keep_every_tokens``.

    The first of each span between two multiples always stays, so that what was removed before makes no difference:
    pruning after every save keeps what pruning once at the end would. The span from 0 has no multiple before it.
    """
    stay = set(sorted(tokens)[-keep_last:])
    if keep_every_tokens is not None:
        firsts: dict[int, int] = {}
        for position in sorted(tokens):
            firsts.setdefault(position // keep_every_tokens, position)
        stay |= {position for span, position in firsts.items() if span > 0}
    return stay


def removable(root: Path, keep_last: int, keep_every_tokens: int | None = None) -> list[Path]:
    """The checkpoints below ``root`` that need not stay (see :func:`kept`), the oldest first, and torn ones before the
    newest whole one (a newer one may be in the making)."""
    found = list(candidates(root))
    whole = {folder: manifest.state.tokens for folder, manifest in found if isinstance(manifest, Manifest)}
    stay = kept(list(whole.values()), keep_last, keep_every_tokens)
    newest_whole = max(whole, default=None)
    out = []
    for folder, _ in reversed(found):
        is_torn = folder not in whole
        if (is_torn and newest_whole is not None and folder < newest_whole) or (
            not is_torn and whole[folder] not in stay
        ):
            out.append(folder)
    return out


def prune(root: Path, keep_last: int, keep_every_tokens: int | None = None) -> list[str]:
    """Remove what :func:`removable` says; returns a line about each that could not be removed (the next call tries
    again)."""
    problems = []
    for folder in removable(root, keep_last, keep_every_tokens):
        try:
            remove(folder)
        except OSError as error:
            problems.append(f"old checkpoint {folder.name} could not be removed: {error.strerror or error}")
    return problems
