"""Which files the user means, and what identifies their contents."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_pipeline.errors import UserError

KINDS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class InputEntry:
    """An input file as it was read: name relative to the corpus, size, XXH3-128 of the bytes on disk (hex)."""

    name: str
    bytes: int
    xxh3_128: str


def unsupported(path: Path) -> UserError:
    """The error for a file of a kind that is not read."""
    return UserError(f"{path}: files of this kind are not read; supported are {', '.join(KINDS)}")


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """Files named by files, folders (searched to any depth) and globs (``**`` too), each once, sorted by path.

    Folders and globs give the files of a supported kind. Raises :class:`UserError` for an input that does not exist or
    gives nothing, and for a file of another kind.
    """
    supported = ", ".join(KINDS)
    found: dict[Path, Path] = {}
    for given in inputs:
        path = Path(given)
        if path.is_file():
            if kind_of(path) is None:
                raise unsupported(path)
            files = [path]
        elif path.is_dir():
            files = [p for p in path.rglob("*") if _wanted(p, path)]
            if not files:
                raise UserError(f"folder {path} has no file to read (supported are {supported})")
        elif glob.has_magic(str(given)):
            files = [p for p in map(Path, glob.glob(str(given), recursive=True)) if _wanted(p, p.parent)]
            if not files:
                raise UserError(f"pattern {given} matches no file to read (supported are {supported})")
        else:
            raise UserError(f"input {path} does not exist")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise UserError("no inputs were given")
    return sorted(found.values(), key=lambda p: str(p.resolve()))


def _wanted(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and kind_of(path) is not None and path.is_file()


def kind_of(path: Path) -> str | None:
    """'jsonl', 'parquet' or 'text' by the file's name; None for anything else."""
    name = path.name.lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def relative_names(paths: Sequence[Path]) -> list[str]:
    """Names of files from their deepest common folder on: the same wherever a corpus lies."""
    resolved = [p.resolve() for p in paths]
    root = os.path.commonpath([str(p.parent) for p in resolved])
    return [p.relative_to(root).as_posix() for p in resolved]


def identify_inputs(paths: Sequence[Path]) -> tuple[InputEntry, ...]:
    """Name, size and hash of each file. Reads every file once, some hundred times as fast as it is tokenized."""
    return tuple(_identify(path, name) for path, name in zip(paths, relative_names(paths), strict=True))


def _identify(path: Path, name: str) -> InputEntry:
    digest = xxhash.xxh3_128()
    size = 0
    try:
        with open(path, "rb") as f:
            while data := f.read(1 << 20):
                digest.update(data)
                size += len(data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return InputEntry(name, size, digest.hexdigest())


def total_text_bytes(paths: Sequence[Path]) -> int | None:
    """About how much text plain and JSONL files hold (their size on disk); None if compression hides it."""
    if all(kind_of(path) != "parquet" and not path.name.lower().endswith(".gz") for path in paths):
        return sum(path.stat().st_size for path in paths)
    return None
