"""What decides the bytes of shards that are imported: token files, the tokenizer, and how documents end."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.exchange import datatrove, megatron
from data_pipeline.exchange.tokenfile import TokenFile, TokenFormat
from data_pipeline.prepare.plan import DEFAULT_SHARD_TOKENS, Preparation, Settings, Unit, json_sha256, unit_bytes
from data_pipeline.shards.manifest import MANIFEST_FILE
from data_pipeline.sources.inputs import CorpusFile, relative_names
from data_pipeline.sources.pieces import Piece
from data_pipeline.tokenization.tokenizer import Tokenizer

ABOUT = "about"  # kind of the pieces that stand for indexes and the like: read by the plan, hashed by the worker
KINDS = "Megatron-LM's .bin with .idx, datatrove's .ds"


@dataclass(frozen=True)
class ImportSettings(Settings):
    """How token files become shards. Every field decides bytes.

    ``end_id`` is the token that may stand at the end of each document; ``require_end``: it must. ``mixed_ends``:
    it stands at the end of some. Without ``end_id`` all ids are text, and an end token is added to each document.
    """

    end_id: int | None = None
    require_end: bool = False
    mixed_ends: bool = False
    form: TokenFormat = field(default_factory=TokenFormat)

    def facts(self) -> dict[str, Any]:
        """The settings as JSON values, as the manifest keeps them."""
        ends = {"end_id": self.end_id, "require_end": self.require_end, "mixed_ends": self.mixed_ends}
        return {"import": {**ends, **self.form.facts()}, "shard_tokens": self.shard_tokens}


@dataclass(frozen=True)
class ImportPlan(Preparation):
    """A folder of shards to be made of token files."""

    sources: tuple[TokenFile, ...] = ()

    @property
    def text_bytes(self) -> int:
        """Bytes of tokens: what progress is counted in."""
        return sum(piece.size for unit in self.units for piece in unit.pieces)

    def facts(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return self.settings.facts()


def plan_import(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    end_token: str | None = None,
    mixed_ends: bool = False,
    form: TokenFormat | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    without: Path | None = None,
) -> ImportPlan:
    """Check the indexes of token files and cut them at documents into units of work; the ids are not looked at.

    ``inputs``: files, prefixes of Megatron's pairs, folders and globs, which leave out the folder ``without``.
    ``end_token`` is a token's text or id, or ``none``; left out: the tokenizer's own, which then stands behind all
    documents or behind none. Raises :class:`UserError` for inputs that do not exist, are damaged or unknown.
    """
    end_id = _end_id(tokenizer, end_token)
    form = form or TokenFormat()
    form = TokenFormat(form.token_size, end_id, form.ignore_loss)
    sources = [open_tokens(path, form) for path in find_token_files(inputs, without)]
    named = end_token is not None or any(source.documents is None for source in sources)
    settings = ImportSettings(
        shard_tokens=shard_tokens,
        end_id=end_id,
        require_end=named and end_id is not None and not mixed_ends,
        mixed_ends=mixed_ends,
        form=form,
    )
    described = [path for source in sources for path in source.described_by]
    paths = sorted([source.path for source in sources] + described)
    names = dict(zip(paths, relative_names(paths), strict=True))
    files = tuple(_file(path, names[path]) for path in paths)
    times = {file.name: file.mtime_ns for file in files}
    target = unit_bytes(sum(source.tokens * source.dtype.itemsize for source in sources))
    units: list[Unit] = []
    for source in sources:
        about = [_about(path, names[path]) for path in source.described_by]
        held: list[Piece] = about
        for piece in source.pieces(names[source.path], target):
            # A file of its own has units of its own: messages and sources then speak of one file.
            pieces = (*held, piece)
            places = [[p.name, p.kind, p.begin, p.end, p.rows, times[p.name]] for p in pieces]
            units.append(Unit(len(units), pieces, json_sha256(len(units), places)))
            held = []
    first, more = sources[0].path, len(sources) - 1
    description = f"{first}" + (f" and {more:,} more file(s)" if more else "")
    return ImportPlan(tuple(units), files, description, tokenizer, settings, sources=tuple(sources))


def open_tokens(path: Path, form: TokenFormat, checked: bool = False) -> TokenFile:
    """A token file by its suffix; see the classes for what is checked."""
    if path.suffix == ".ds":
        return datatrove.DatatroveFile(path, form, checked)
    return megatron.MegatronFile(path, checked)


def find_token_files(inputs: Sequence[str | Path], without: Path | None = None) -> list[Path]:
    """The .bin and .ds files that inputs stand for, each once, sorted by path; see :func:`plan_import`."""
    found: dict[Path, Path] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            paths = [p for p in _walk(path) if without is None or not p.resolve().is_relative_to(without.resolve())]
            if not paths:
                held = " (it holds shards already)" if (path / MANIFEST_FILE).is_file() else ""
                raise UserError(f"folder {path} has no token files{held}; these are read: {KINDS}")
        elif (single := _token_file(path)) is not None:
            paths = [single]
        elif glob.has_magic(str(given)):
            matches = (Path(match) for match in glob.iglob(str(given), recursive=True))
            paths = [single for match in matches if match.is_file() and (single := _token_file(match)) is not None]
            if not paths:
                raise UserError(f"pattern {given} matches no token file; these are read: {KINDS}")
        elif path.exists():
            raise UserError(f"{path} is no token file; these are read: {KINDS}")
        else:
            raise UserError(f"{path} does not exist, nor do {path}.bin and {path}.idx")
        for file in paths:
            found.setdefault(file.resolve(), file)
    return sorted(found.values(), key=os.path.abspath)


def _token_file(path: Path) -> Path | None:
    """The file of tokens that a path names: itself, the one its index belongs to, or that of a prefix."""
    if path.suffix in (".bin", ".idx") and (path.is_file() or path.with_suffix(".idx").is_file()):
        return path.with_suffix(".bin")
    stem = path.with_suffix("")
    if path.suffix == ".ds" and path.is_file():
        return path
    if path.suffix in (".index", ".metadata", ".loss") and stem.suffix == ".ds" and stem.is_file():
        return stem
    if not path.is_file() and path.with_name(path.name + ".idx").is_file():
        return path.with_name(path.name + ".bin")
    return None


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if MANIFEST_FILE in names:  # shards of ours have .bin files too
            continue
        for name in sorted(names):
            if name.endswith((".idx", ".ds")) and not name.startswith("."):
                file = _token_file(Path(root, name))
                assert file is not None
                yield file


def _end_id(tokenizer: Tokenizer, end_token: str | None) -> int | None:
    if end_token is None:
        return tokenizer.eos_id
    if end_token == "none":
        return None
    vocabulary = tokenizer.vocabulary()
    if end_token in vocabulary:
        return vocabulary[end_token]
    if end_token.isdecimal() and int(end_token) < tokenizer.vocab_size:
        return int(end_token)
    raise UserError(
        f"end token {end_token!r} is neither a token nor an id of the tokenizer, which has {tokenizer.vocab_size:,} "
        f"tokens; its own end token is {tokenizer.name_of(tokenizer.eos_id)!r} ({tokenizer.eos_id})"
    )


def _about(path: Path, name: str) -> Piece:
    size = path.stat().st_size
    return Piece(name, str(path), ABOUT, 0, size, None, 0, size)


def _file(path: Path, name: str) -> CorpusFile:
    stat = path.stat()
    return CorpusFile(name, path, path.suffix[1:], stat.st_size, stat.st_mtime_ns)
