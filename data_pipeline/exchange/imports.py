"""`nystrom data import`: tokens that another program wrote become shards, id for id.

The machinery is that of :mod:`data_pipeline.prepare`: units of work, records of what is finished, a manifest that is
written last. A unit compares every id with the vocabulary while it copies, and reads its shards back when they are
written. Documents end with the tokenizer's end token in shards; one that the source has there is not doubled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.exchange.plan import ABOUT, ImportPlan, ImportSettings, open_tokens
from data_pipeline.exchange.readback import shard_hash
from data_pipeline.exchange.tokenfile import IdCheck, IdsHash, TokenDocument, TokenFile, place
from data_pipeline.prepare.complete import check_complete, complete
from data_pipeline.prepare.executors import Executor, InProcess, Processes
from data_pipeline.prepare.folder import TOKENIZER, Deal, check_folder, lock_folder, start_run
from data_pipeline.prepare.plan import Unit, json_sha256
from data_pipeline.prepare.worker import WORK, Context, UnitResult, Worker, writing
from data_pipeline.shards.manifest import MANIFEST_FILE
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.shards.writer import UnitWriter, token_dtype
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.streams import piece_digest

_AT_ONCE = 1 << 20  # bytes between two looks at progress


@dataclass
class ImportedUnit(UnitResult):
    """What a finished unit copied. ``text_bytes`` is 0: nobody has seen the text."""

    token_bytes: int = 0  # of the source
    source_tokens: int = 0
    with_end: int = 0  # documents that had the end token behind them, or nothing but it
    without_end: int = 0  # documents that did not
    inner_ends: int = 0  # end tokens elsewhere in documents
    end_at: str = ""  # the first document with an end token, for messages
    no_end_at: str = ""  # and the first without


@dataclass(frozen=True)
class ImportContext(Context):
    """What every process of an import is told."""

    settings: ImportSettings

    def worker(self, on_text: Callable[[int], None]) -> ImportWorker:
        """Does the units of an import."""
        return ImportWorker(self, on_text)


class ImportWorker(Worker):
    """Copies units of token files into shards."""

    result_type: ClassVar[type[UnitResult]] = ImportedUnit
    context: ImportContext

    def _tokenize(self, unit: Unit, backend: str) -> ImportedUnit:
        tokenizer, settings = self.tokenizer, self.context.settings
        dtype = token_dtype(tokenizer.vocab_size)
        check, copied, since = IdCheck(tokenizer), IdsHash(), 0
        result = ImportedUnit(unit.number, self.key(unit), unit.part)
        with writing(self.context.folder):
            writer = UnitWriter(
                self.context.folder,
                unit.number,
                dtype=dtype,
                shard_tokens=settings.shard_tokens,
                eos_id=tokenizer.eos_id,
            )
            try:
                for piece in unit.pieces:
                    result.digests.append(piece_digest(piece) or "")
                    if piece.kind == ABOUT:
                        continue
                    for document in _opened(piece, settings).read(piece):
                        check.check(document, piece.location)
                        ids = _without_end(document, piece.location, settings, result)
                        since += document.ids.nbytes
                        if len(ids):
                            writer.add(ids, piece.name)
                            copied.update(ids, np.array([len(ids)]))
                            result.documents += 1
                        else:
                            result.empty += 1
                        if since >= _AT_ONCE:
                            self._on_text(since)
                            since = 0
                    result.token_bytes += piece.size
                result.shards = writer.finish()
            finally:
                writer.abort()
        written = shard_hash(self.context.folder, result.shards, dtype)
        if written.hexdigest() != copied.hexdigest():
            raise UserError(
                f"{self.context.folder}: unit {unit.number} does not read back as it was written: "
                f"{written.documents:,} documents, {written.tokens:,} tokens of {copied.documents:,} and "
                f"{copied.tokens:,}; is the disk sound?"
            )
        self._on_text(since)
        return result


def _opened(piece: Piece, settings: ImportSettings) -> TokenFile:
    source = open_tokens(Path(piece.location), settings.form, checked=True)
    if piece.total != source.tokens * source.dtype.itemsize:
        raise UserError(f"{piece.location} has changed since it was planned: run the same command again")
    return source


def _without_end(document: TokenDocument, path: str, settings: ImportSettings, result: ImportedUnit) -> np.ndarray:
    """The document's ids less its end token. Raises :class:`UserError` where documents end in different ways."""
    ids, end = document.ids, settings.end_id
    result.source_tokens += len(ids)
    if end is None or not len(ids):
        return ids
    inner = int(np.count_nonzero(ids == end))
    has_end = bool(ids[-1] == end)
    result.inner_ends += inner - has_end
    if has_end:
        result.with_end += 1
        result.end_at = result.end_at or place(document, path)
    else:
        result.without_end += 1
        result.no_end_at = result.no_end_at or place(document, path)
    if (result.with_end and result.without_end) or (settings.require_end and result.without_end):
        check_ends(settings, result.end_at, result.no_end_at)
    return ids[:-1] if has_end else ids


def check_ends(settings: ImportSettings, end_at: str, no_end_at: str) -> None:
    """Raise :class:`UserError` if documents end in another way than the settings allow; places of documents that do
    and that do not have the end token, or ""."""
    if settings.mixed_ends or not no_end_at:
        return
    if settings.require_end:
        raise UserError(
            f"{no_end_at}: the document does not end with the end token {settings.end_id}: was the file cut? Else name "
            "another token with --end-token, or none, or say --mixed-ends if only some documents have it"
        )
    if end_at:
        raise UserError(
            f"some documents end with the end token {settings.end_id} ({end_at}), some do not ({no_end_at}): were the "
            "files cut or mixed? With --mixed-ends both kinds are taken, with --end-token none that token is text; add "
            "--overwrite, since the shards begun here go by other settings"
        )


@dataclass(frozen=True)
class ImportResult:
    """What a call of :func:`import_tokens` did; counts of the whole folder, also of units that were done before."""

    shards: ShardSet
    already_complete: bool = False
    units: int = 0
    units_reused: int = 0
    token_bytes: int = 0
    source_tokens: int = 0
    source_documents: int = 0
    with_end: int = 0
    without_end: int = 0
    inner_ends: int = 0


def import_tokens(
    plan: ImportPlan,
    folder: str | Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda size: None,
) -> ImportResult:
    """Copy token files into a shard folder; does only what an earlier, interrupted call left.

    ``on_bytes`` is called with the bytes of tokens that were done. Raises :class:`UserError` for ids outside the
    vocabulary, documents that end in different ways, counts that are not those of the index, and a folder that holds
    something else (unless ``overwrite`` and it holds shards).
    """
    folder = Path(folder)
    assert isinstance(plan.settings, ImportSettings)
    if (folder / MANIFEST_FILE).exists() and not overwrite:
        shards = check_complete(plan, folder, None)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return ImportResult(shards, already_complete=True)
    check_folder(folder)
    with lock_folder(folder, None) as work, writing(folder):
        start_run(folder, work, plan.purpose, overwrite=overwrite, part=None, deal=Deal.of(plan.units, 1))
        plan.tokenizer.save(work / TOKENIZER)
        context = ImportContext(
            folder, str(work / TOKENIZER), json_sha256(plan.decisions()), plan.settings, max_bad_fraction=0.0
        )
        worker = ImportWorker(context, on_bytes, plan.tokenizer)
        workers = min(workers, len(plan.units))
        executor: Executor = Processes(worker, workers, on_bytes) if workers > 1 else InProcess(worker)
        results: list[tuple[Unit, ImportedUnit]] = []
        units = {unit.place: unit for unit in plan.units}
        try:
            for result in executor.run("tokenize", plan.units, "tokens"):
                if result.reused:
                    on_bytes(result.token_bytes)
                results.append((units[result.place], result))
        finally:
            executor.close()
        results.sort(key=lambda pair: pair[0].place)
        counts = _count(plan, [result for _, result in results])
        complete(plan, folder, results, {}, 0.0)
        shutil.rmtree(work)
        reused = sum(result.reused for _, result in results)
        return ImportResult(ShardSet.open(folder), False, len(results), reused, **counts)


def _count(plan: ImportPlan, results: list[ImportedUnit]) -> dict[str, int]:
    """Sums over all units, compared with each other and with what the indexes say."""
    assert isinstance(plan.settings, ImportSettings)
    names = ("token_bytes", "source_tokens", "with_end", "without_end", "inner_ends")
    counts = {name: sum(getattr(result, name) for result in results) for name in names}
    counts["source_documents"] = sum(result.documents + result.empty for result in results)
    ends = next((result.end_at for result in results if result.end_at), "")
    check_ends(plan.settings, ends, next((result.no_end_at for result in results if result.no_end_at), ""))
    tokens = sum(source.tokens for source in plan.sources)
    known = [source.documents for source in plan.sources]
    documents = None if None in known else sum(count or 0 for count in known)
    written = sum(shard.num_tokens for result in results for shard in result.shards)
    expected = counts["source_tokens"] - counts["with_end"] + sum(result.documents for result in results)
    if counts["source_tokens"] != tokens or documents not in (None, counts["source_documents"]) or written != expected:
        raise UserError(
            f"{plan.description}: {counts['source_documents']:,} documents and {counts['source_tokens']:,} tokens were "
            f"read, {'' if documents is None else f'{documents:,} documents and '}{tokens:,} tokens are listed"
        )
    return counts
