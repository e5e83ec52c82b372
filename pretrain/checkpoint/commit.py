"""What makes a folder of files a checkpoint: a manifest with checksums, written last.

DeepSpeed's own ``save_checkpoint`` moves its pointer before all processes have written (0.19.8, stages 1 and 2), so
that a kill in between leaves it on a torn checkpoint. Here each process fsyncs the files that it wrote, and the folder.
After a barrier ``manifest.json`` is written, by rename and fsync of the folder: every file's size and XXH3-128, and the
training state. An fsync of the folder above makes the checkpoint's name durable. Only then is an older one removed, its
manifest first. A folder without a manifest that checks out is no checkpoint. Nor is one with another name than its
manifest's tag: that one is the user's. ``latest`` names the last one for people and scripts. Here it only tells that
there has been one. This module knows files only; ``pretrain.checkpoint.store`` uses it in step with the other
processes. What is promised of a folder of checkpoints is in docs/checkpoints.md.
"""

from __future__ import annotations

import json
import os
import re
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
DAMAGED, SUSPECT, REPLACED = "damaged", "suspect", "replaced"
"""Why a folder was set aside: the first part of its new name."""
_TAG = re.compile(r"step(\d{9,})")
_SPARE = re.compile(rf"({DAMAGED}|{SUSPECT})-step\d{{9,}}(\.\d+)?")


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
    suspect_in_row: int = 0  # last steps that were skipped as not finite, or whose loss was out of its band
    sound_step: int = 0  # of the newest checkpoint after which a step went well; 0 for none

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


def step_of(name: str) -> int | None:
    """The step whose checkpoint a folder of this name may be; None for names that are the user's."""
    found = _TAG.fullmatch(name)
    return int(found[1]) if found and tag_name(int(found[1])) == name else None


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


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint folder to ``why-NAME``, under which it never counts; returns the new path."""
    aside, number = folder.with_name(f"{why}-{folder.name}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{why}-{folder.name}.{number}")
    folder.rename(aside)
    fsync_folder(folder.parent)
    return aside


def vacate(folder: Path) -> None:
    """Free the name of a save: remove what a save that did not finish left, rename anything that has a manifest."""
    if (folder / MANIFEST).exists():
        set_aside(folder, REPLACED)
    else:
        remove(folder)


def spares(root: Path) -> list[Path]:
    """Folders that were set aside as damaged or suspect: the first to be removed where space is needed."""
    return [p for p in sorted(root.glob("*-step*")) if p.is_dir() and _SPARE.fullmatch(p.name)]


def had_any(root: Path) -> bool:
    """Whether a checkpoint was ever committed below ``root``, as far as what is left can tell.

    A folder without a manifest alone does not: it is what a first save leaves that did not finish.
    """
    if (root / LATEST).exists() or spares(root):
        return True
    return any((folder / MANIFEST).exists() for folder, _ in candidates(root))


def candidates(root: Path) -> Iterator[tuple[Path, Manifest | str]]:
    """Checkpoint folders below ``root`` from the newest to the oldest, each with its manifest or what is wrong with it.

    Only manifests and sizes are looked at, so this is quick; :func:`problem_with` reads the contents. Folders with
    another name than their manifest's tag are left out: they are the user's.
    """
    steps = {step: p for p in root.glob("step*") if (step := step_of(p.name)) is not None and p.is_dir()}
    for _, folder in sorted(steps.items(), reverse=True):
        try:
            manifest = Manifest.read(folder)
            if manifest.tag == folder.name:
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


def removable(
    root: Path,
    keep_last: int,
    keep_every_tokens: int | None = None,
    *,
    verified: str | None = None,
    sound_step: int | None = None,
    suspect: bool | None = None,
) -> list[Path]:
    """The checkpoints below ``root`` that need not stay, the oldest first, and torn ones.

    Only what is older than ``verified``, the tag of a checkpoint known to be whole (left out: the newest whose contents
    match its manifest). That one stays, and so does the one of ``sound_step``; of the others see :func:`kept`. In a
    streak of suspect steps (``suspect``) only checkpoints of the streak go. The last two follow from the state of the
    verified one if they are left out.
    """
    found = list(candidates(root))
    if verified is None:
        verified = next((folder.name for folder, m in found if isinstance(m, Manifest) and _matches(folder, m)), None)
    names = [folder.name for folder, _ in found]
    if verified not in names:
        return []
    found = found[names.index(verified) :]
    known = found[0][1]
    if not isinstance(known, Manifest):
        return []
    sound_step = known.state.sound_step if sound_step is None else sound_step
    if suspect is None:
        suspect = known.state.suspect_in_row > 0 and sound_step != known.state.step
    whole = {folder: manifest.state for folder, manifest in found if isinstance(manifest, Manifest)}
    stay = {root / verified, root / tag_name(sound_step)}
    if suspect:
        stay |= {folder for folder, state in whole.items() if not state.suspect_in_row}
    rotating = {folder: state.tokens for folder, state in whole.items() if state.suspect_in_row or not suspect}
    positions = kept(list(rotating.values()), keep_last, keep_every_tokens)
    stay |= {folder for folder, tokens in rotating.items() if tokens in positions}
    return [folder for folder, _ in reversed(found) if folder not in stay]


def _matches(folder: Path, manifest: Manifest) -> bool:
    return problem_with(folder, manifest, manifest.files) is None


def prune(
    root: Path,
    keep_last: int,
    keep_every_tokens: int | None = None,
    *,
    verified: str | None = None,
    sound_step: int | None = None,
) -> list[str]:
    """Remove what :func:`removable` says; returns a line about each that could not be removed (the next call tries
    again)."""
    problems = []
    for folder in removable(root, keep_last, keep_every_tokens, verified=verified, sound_step=sound_step):
        try:
            remove(folder)
        except OSError as error:
            problems.append(f"old checkpoint {folder.name} could not be removed: {error.strerror or error}")
    return problems
