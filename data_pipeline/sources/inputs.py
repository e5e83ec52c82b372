"""Input files on disk: files, folders and globs to a sorted list with names that do not depend on the place."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.sources.format import of_path, supported

UNSEEKABLE = (
    "a pipe or a device, which can be read only once: save it to a file; `nystrom data prepare` reads standard input "
    "(--input - --stdin-format jsonl < PIPE)"
)


@dataclass(frozen=True)
class CorpusFile:
    """An input file: its name relative to the corpus, and what the file system says of it."""

    name: str
    path: Path
    kind: str
    bytes: int
    mtime_ns: int


def find_files(
    inputs: Sequence[str | Path], without: Path | None = None, on_other: Callable[[Path], object] = lambda path: None
) -> tuple[CorpusFile, ...]:
    """:func:`expand_inputs`, with each file's name, kind and size."""
    paths = expand_inputs(inputs, without, on_other)
    return tuple(_file(path, name) for path, name in zip(paths, relative_names(paths), strict=True))


def _file(path: Path, name: str) -> CorpusFile:
    kind = kind_of(path)
    assert kind is not None
    try:
        name.encode()
        stat = path.stat()
    except UnicodeEncodeError:
        raise UserError(f"{name!r}: the name of this file is not UTF-8; rename it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return CorpusFile(name, path, kind, stat.st_size, stat.st_mtime_ns)


def expand_inputs(
    inputs: Sequence[str | Path], without: Path | None = None, on_other: Callable[[Path], object] = lambda path: None
) -> list[Path]:
    """Files named by files, folders (searched to any depth) and globs (``**`` too), each once, sorted by path.

    Folders and globs give the files of a supported kind; what is hidden or lies in the folder ``without`` is left out,
    links are followed. ``on_other`` is called with each file there that is of another kind. Raises
    :class:`UserError` for an input that does not exist, is a pipe or gives nothing, and for a file of another kind.
    """
    found: dict[Path, Path] = {}
    for given in inputs:
        path = Path(given)
        others: list[Path] = []
        if path.is_file():
            if kind_of(path) is None:
                raise UserError(f"{path}: files of this kind are not read; supported are {supported()}")
            files = [path]
        elif path.is_dir():
            files, others = _sorted_out(_outside(without, _walk(path)))
            if not files:
                raise UserError(f"folder {path} has no file to read (supported are {supported()}){_instead(others)}")
        elif glob.has_magic(str(given)):
            matches = map(Path, glob.iglob(str(given), recursive=True))
            shown = (match for match in matches if not match.name.startswith(".") and match.is_file())
            files, others = _sorted_out(_outside(without, shown))
            if not files:
                raise UserError(
                    f"pattern {given} matches no file to read (supported are {supported()}){_instead(others)}"
                )
        elif path.exists():
            raise UserError(f"input {path} is {UNSEEKABLE}")
        else:
            raise UserError(f"input {path} does not exist")
        for file in files:
            # A linked folder is the same by any way into it. A linked file stays a file of its own: in the hub's cache
            # files of equal contents are links to one blob, and a copy of that folder shall give the same corpus.
            found.setdefault(file.parent.resolve() / file.name, file)
        for other in others:
            on_other(other)
    if not found:
        raise UserError("no inputs were given")
    return sorted(found.values(), key=lambda p: _absolute(p).as_posix())


def relative_names(paths: Sequence[Path]) -> list[str]:
    """Names of files from their deepest common folder on: the same wherever a corpus lies."""
    absolute = [_absolute(p) for p in paths]
    root = os.path.commonpath([str(p.parent) for p in absolute])
    return [p.relative_to(root).as_posix() for p in absolute]


def kind_of(path: Path) -> str | None:
    """The kind by the file's name, compression included (such as 'jsonl.gz'); None for anything else."""
    found = of_path(path)
    return None if found is None else ".".join(filter(None, (found[0].name, found[1])))


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = (name for name in names if not name.startswith("."))
        yield from (Path(root, name) for name in shown if os.path.isfile(os.path.join(root, name)))


def _outside(folder: Path | None, files: Iterable[Path]) -> list[Path]:
    if folder is None:
        return list(files)
    root = folder.resolve()
    return [file for file in files if not file.parent.resolve().is_relative_to(root)]


def _sorted_out(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Those of a supported kind, and the others."""
    parts: tuple[list[Path], list[Path]] = ([], [])
    for file in files:
        parts[kind_of(file) is None].append(file)
    return parts


def _instead(others: Sequence[Path]) -> str:
    """What to do with files that hold tokens and no text."""
    if any(other.suffix in (".idx", ".ds") for other in others):
        return "; `nystrom data import` reads token files (.bin with .idx, .ds)"
    return ""


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
