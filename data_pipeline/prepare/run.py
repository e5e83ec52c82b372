"""`nystrom data prepare`: text in, an immutable shard folder out, the same bytes however often it was interrupted.

The inputs, sorted, are cut into *units of work* by their sizes alone. A finished unit leaves its shards and a small
record in ``.work/``; a killed run started again does the units without a record anew. The manifest, written last,
makes the folder complete, and ``.work/`` goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import TMP_SUFFIX, fsync_folder, write_atomic
from data_pipeline.shards.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    ShardEntry,
    hash_stream,
    parse_shard,
    read_manifest,
)
from data_pipeline.shards.shardset import ShardSet, check_size
from data_pipeline.shards.writer import UnitWriter, is_shard_file, remove_files, token_dtype
from data_pipeline.sources.documents import Counts, Document, iter_documents
from data_pipeline.sources.inputs import InputEntry, expand_inputs, identify_inputs
from data_pipeline.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer

DEFAULT_SHARD_TOKENS = 1 << 27  # 256 MB as uint16
UNIT_BYTES = 64 << 20  # about 15 s of tokenizing, the most that a crash costs unless a single file is larger
_BATCH_BYTES = 1 << 20  # text handed to the tokenizer at once: enough for all cores, little memory
_WORK = ".work"


@dataclass(frozen=True)
class Unit:
    """Input files that are tokenized together into shards of their own."""

    number: int
    files: tuple[int, ...]  # places in the list of inputs


@dataclass(frozen=True)
class Preparation:
    """Everything that decides the bytes of a shard folder."""

    paths: tuple[Path, ...]
    inputs: tuple[InputEntry, ...]
    units: tuple[Unit, ...]
    tokenizer: Tokenizer
    text_field: str
    shard_tokens: int

    @property
    def key(self) -> str:
        """SHA-256 (hex) of the settings and the contents of all inputs: equal keys, equal shard folders."""
        return self._hash(inputs=[asdict(entry) for entry in self.inputs], units=[unit.files for unit in self.units])

    @property
    def purpose(self) -> str:
        """SHA-256 (hex) of the settings and the names of the inputs: an unfinished run may be continued by its equals,
        also after a broken input was mended."""
        return self._hash(names=[entry.name for entry in self.inputs])

    def unit_key(self, unit: Unit) -> str:
        """SHA-256 (hex) of all that decides the shards of one unit."""
        return self._hash(unit=unit.number, inputs=[asdict(self.inputs[i]) for i in unit.files])

    def _hash(self, **facts: object) -> str:
        settings = {
            "format_version": FORMAT_VERSION,
            "tokenizer": self.tokenizer.hash,
            "text_field": self.text_field,
            "shard_tokens": self.shard_tokens,
        }
        return hashlib.sha256(json.dumps({**settings, **facts}, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class UnitResult:
    """What a finished unit wrote; also the record in ``.work/``."""

    key: str
    shards: tuple[ShardEntry, ...]
    documents: int
    empty: int
    text_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What a call of :func:`prepare` did."""

    shards: ShardSet
    already_complete: bool
    units_reused: int
    documents: int  # tokenized by this call
    text_bytes: int


def plan_preparation(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
) -> Preparation:
    """Find and hash the inputs and cut them into units."""
    if shard_tokens < 1:
        raise UserError(f"shard_tokens must be positive, got {shard_tokens}")
    paths = expand_inputs(inputs)
    entries = identify_inputs(paths)
    return Preparation(tuple(paths), entries, tuple(_cut(entries)), tokenizer, text_field, shard_tokens)


def _cut(entries: Sequence[InputEntry]) -> Iterator[Unit]:
    number, files, size = 0, list[int](), 0
    for i, entry in enumerate(entries):
        if files and size + entry.bytes > UNIT_BYTES:
            yield Unit(number, tuple(files))
            number, files, size = number + 1, [], 0
        files.append(i)
        size += entry.bytes
    if files:
        yield Unit(number, tuple(files))


def prepare(
    preparation: Preparation,
    folder: str | Path,
    *,
    overwrite: bool = False,
    on_document: Callable[[Document], None] = lambda document: None,
    on_reused: Callable[[UnitResult], None] = lambda result: None,
) -> Outcome:
    """Tokenize into ``folder``; does only what an earlier, interrupted call with the same inputs and settings left.

    ``on_document`` is called for each document tokenized and ``on_reused`` for each unit found finished. Raises
    :class:`UserError` for bad input, no documents at all, and a folder that holds something else (unless ``overwrite``
    and it holds shards).
    """
    folder = Path(folder)
    if (folder / MANIFEST_FILE).exists() and not overwrite:
        manifest = read_manifest(folder)
        if manifest.plan != preparation.key:
            raise UserError(_occupied(folder, "shards of other inputs, another tokenizer or other settings"))
        shards = ShardSet.open(folder)
        shutil.rmtree(folder / _WORK, ignore_errors=True)  # left if the last run died between the manifest and the end
        return Outcome(shards, True, len(preparation.units), 0, 0)
    _check_folder(folder)
    try:
        with _locked(folder) as work:
            _begin(folder, work, preparation.purpose, overwrite)
            outcome = _run(preparation, folder, work, on_document, on_reused)
    except OSError as error:  # reading has its own errors: this is a full disk, or a folder taken away
        raise UserError(f"writing to {folder} failed: {error}; what is finished stays, run the command again") from None
    return outcome


def _run(
    preparation: Preparation,
    folder: Path,
    work: Path,
    on_document: Callable[[Document], None],
    on_reused: Callable[[UnitResult], None],
) -> Outcome:
    results: list[UnitResult] = []
    reused = documents = text_bytes = 0
    for unit in preparation.units:
        record = work / f"unit-{unit.number:05d}.json"
        result = _finished(folder, record, preparation.unit_key(unit))
        if result is not None:
            reused += 1
            on_reused(result)
        else:
            result = _tokenize(preparation, unit, folder, on_document)
            write_atomic(record, json.dumps(asdict(result)).encode())
            documents += result.documents
            text_bytes += result.text_bytes
        results.append(result)
    _complete(preparation, folder, results)
    shutil.rmtree(work)
    return Outcome(ShardSet.open(folder), False, reused, documents, text_bytes)


def _tokenize(
    preparation: Preparation, unit: Unit, folder: Path, on_document: Callable[[Document], None]
) -> UnitResult:
    tokenizer = preparation.tokenizer
    paths = [preparation.paths[i] for i in unit.files]
    names = {preparation.paths[i]: preparation.inputs[i].name for i in unit.files}
    writer = UnitWriter(
        folder,
        unit.number,
        dtype=token_dtype(tokenizer.vocab_size),
        shard_tokens=preparation.shard_tokens,
        eos_id=tokenizer.eos_id,
    )
    counts = Counts()
    try:
        for batch in _batches(iter_documents(paths, preparation.text_field, counts)):
            for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                writer.add(ids, names[document.path])
                on_document(document)
        shards = writer.finish()
    finally:
        writer.abort()
    return UnitResult(preparation.unit_key(unit), shards, counts.documents, counts.empty, counts.text_bytes)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _complete(preparation: Preparation, folder: Path, results: Sequence[UnitResult]) -> None:
    documents = sum(result.documents for result in results)
    if not documents:
        empty = sum(result.empty for result in results)
        shutil.rmtree(folder / _WORK)
        raise UserError(
            f"no documents: the {len(preparation.paths)} input file(s), {preparation.paths[0]} first, hold "
            + (f"{empty} record(s), all without text in '{preparation.text_field}'" if empty else "no records")
        )
    tokenizer = preparation.tokenizer
    tokenizer.save(folder)
    with open(folder / TOKENIZER_FILE, "rb") as f:
        tokenizer_entry = hash_stream(f, TOKENIZER_FILE)
    shards = tuple(shard for result in results for shard in result.shards)
    listed = {entry.name for shard in shards for entry in (shard.tokens, shard.index)}
    # Left by a unit that was larger before an input was mended.
    remove_files(folder, [p.name for p in folder.iterdir() if is_shard_file(p.name) and p.name not in listed])
    Manifest(
        plan=preparation.key,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=documents,
        empty_documents=sum(result.empty for result in results),
        text_bytes=sum(result.text_bytes for result in results),
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        special_ids={
            "bos": tokenizer.bos_id,
            "pad": tokenizer.pad_id,
            "eos": tokenizer.eos_id,
            "unk": tokenizer.unk_id,
            "mask": tokenizer.mask_id,
        },
        text_field=preparation.text_field,
        tokenizer=tokenizer_entry,
        shards=shards,
        inputs=preparation.inputs,
    ).write(folder)


def _finished(folder: Path, record: Path, key: str) -> UnitResult | None:
    """The result of a unit whose record and files are there, else None."""
    try:
        data = json.loads(record.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    result = UnitResult(**{**data, "shards": tuple(parse_shard(entry) for entry in data["shards"])})
    if result.key != key:
        return None
    try:
        for shard in result.shards:
            check_size(folder, shard.tokens)
            check_size(folder, shard.index)
    except UserError:
        return None
    return result


def _occupied(folder: Path, by: str) -> str:
    return f"{folder} already holds {by}: choose another folder, or --overwrite to replace it"


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder")
    if folder.is_dir():
        foreign = [p.name for p in folder.iterdir() if not _ours(p.name)]
        if foreign:  # never deleted, also not by --overwrite
            raise UserError(
                f"{folder} holds files that are not shards ({sorted(foreign)[0]}): choose an empty or new folder"
            )


def _ours(name: str) -> bool:
    return is_shard_file(name) or name.removesuffix(TMP_SUFFIX) in (MANIFEST_FILE, TOKENIZER_FILE, _WORK)


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """The work folder, held by one process at a time (the lock goes with the process, also when it is killed)."""
    work = folder / _WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {folder} right now") from None
        yield work
    finally:
        os.close(lock)


def _begin(folder: Path, work: Path, purpose: str, overwrite: bool) -> None:
    """Clear what does not belong to this run and leave its purpose in the work folder."""
    plan = work / "plan.json"
    try:
        same = json.loads(plan.read_bytes())["purpose"] == purpose
    except (FileNotFoundError, ValueError):
        same = False
        if not overwrite and any(is_shard_file(p.name) for p in folder.iterdir()):
            raise UserError(_occupied(folder, "shards without a manifest")) from None
    else:
        if not same and not overwrite:
            raise UserError(
                _occupied(folder, "an unfinished run with other inputs, another tokenizer or other settings")
            )
    if not same or (folder / MANIFEST_FILE).exists():
        remove_files(folder, [MANIFEST_FILE])  # first: without it nothing here counts as complete
        fsync_folder(folder)
        remove_files(work, [p.name for p in work.iterdir() if p.name != "lock"])
        remove_files(folder, [p.name for p in folder.iterdir() if is_shard_file(p.name) or p.name == TOKENIZER_FILE])
        write_atomic(plan, json.dumps({"purpose": purpose}).encode())
    remove_files(folder, [p.name for p in folder.iterdir() if p.name.endswith(TMP_SUFFIX)])
