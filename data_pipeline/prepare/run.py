"""`nystrom data prepare`: text in, an immutable shard folder out, the same bytes however often it was interrupted.

The inputs are cut into *units of work* by their sizes alone. A finished unit leaves its shards and a small record in
``.work/``; a killed run started again does the units without a record anew. When duplicates are to be dropped there
are two passes over the units: the first signs every document, the second tokenizes what is left. The manifest,
written last, makes the folder complete, and ``.work/`` goes. How many processes, machines or starts it took leaves no
trace in the bytes.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from data_pipeline.moved import renamed
from data_pipeline.prepare.complete import check_complete, complete
from data_pipeline.prepare.divide import Divider, remove_copy
from data_pipeline.prepare.executors import Executor, InProcess, OnRay, Processes
from data_pipeline.prepare.folder import TOKENIZER, Deal, JobPart, check_folder, copy_prefix, lock_folder, start_run
from data_pipeline.prepare.plan import STDIN, Preparation, Unit, json_sha256, stdin_units
from data_pipeline.prepare.worker import WORK, Context, Encoders, UnitResult, Worker, writing
from data_pipeline.quality.duplicates import find_duplicates
from data_pipeline.shards.manifest import MANIFEST_FILE
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.shards.writer import token_dtype
from data_pipeline.sources.documents import read_piece
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.tally import Tally
from data_pipeline.tokenization.encoder import EncoderChoice, choose_encoder
from data_pipeline.tokenization.roundtrip import Loss, loss

__getattr__ = renamed(__name__, How="PrepareOptions", Outcome="PrepareResult")

# Of the user's text, on which a faster encoder must agree with the stock one, and decoding shows what is lost.
SAMPLE_BYTES = 1 << 18
DEFAULT_MAX_BAD_FRACTION = 0.001


@dataclass(frozen=True)
class PrepareOptions:
    """How the work is done. Nothing here changes a byte of the result."""

    workers: int = 1
    backend: str = "auto"  # auto, tokenizers or tiktoken
    max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION
    part: JobPart | None = None
    ray: str | None = None  # address of a Ray cluster
    overwrite: bool = False


@dataclass(frozen=True)
class PrepareResult:
    """What a call of :func:`prepare` did."""

    shards: ShardSet | None  # None after a part, or a first pass: the folder is not complete
    already_complete: bool = False
    units: int = 0  # of this call
    units_reused: int = 0
    documents: int = 0  # tokenized by this call
    text_bytes: int = 0
    encoder: str = ""  # the backend, and why
    fell_back: tuple[str, ...] = ()  # units that had to leave the faster backend, with the reason
    signed_only: bool = False  # the other parts have not signed their documents yet


def prepare(
    preparation: Preparation,
    folder: str | Path,
    how: PrepareOptions | None = None,
    *,
    stream: BinaryIO | None = None,
    on_text: Callable[[int], None] = lambda size: None,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_loss: Callable[[Loss], None] = lambda found: None,
) -> PrepareResult:
    """Tokenize into ``folder``; does only what an earlier, interrupted call with the same inputs and settings left.

    ``stream`` takes the place of the corpus when that is standard input. ``on_text`` is called with the bytes of text
    that were done, ``on_phase`` with "signing", "comparing" or "tokenizing", ``on_loss``
    before the work if the tokenizer does not give the text of a sample back. Raises :class:`UserError` for bad input,
    no documents at all, too many broken records, and a folder that holds something else (unless ``overwrite`` and it
    holds shards).
    """
    folder, how = Path(folder), how or PrepareOptions()
    if stream is not None and (how.part or how.ray or preparation.settings.dedup):
        raise UserError(
            "standard input is read once, by one machine: for --dedup, --shard-index or --ray save it to a file first"
        )
    if how.part is not None and how.overwrite:
        raise UserError("--overwrite and --shard-index: one part cannot clear what the others write; remove the folder")
    if (folder / MANIFEST_FILE).exists() and not how.overwrite:
        shards = check_complete(preparation, folder, stream)
        shutil.rmtree(folder / WORK, ignore_errors=True)  # left if the last run died between the manifest and the end
        return PrepareResult(shards, already_complete=True)
    check_folder(folder)
    with lock_folder(folder, how.part) as work, writing(folder):
        deal = Deal.of(preparation.units, how.part.count if how.part else 1)
        start_run(folder, work, preparation.purpose, overwrite=how.overwrite, part=how.part, deal=deal)
        return _Run(preparation, folder, work, how, stream, on_text, on_phase, on_loss).run()


class _Run:
    """One call of :func:`prepare` on a locked folder."""

    def __init__(
        self,
        preparation: Preparation,
        folder: Path,
        work: Path,
        how: PrepareOptions,
        stream: BinaryIO | None,
        on_text: Callable[[int], None],
        on_phase: Callable[[str], None],
        on_loss: Callable[[Loss], None],
    ) -> None:
        self.preparation, self.folder, self.work, self.how = preparation, folder, work, how
        self.on_text, self.on_phase, self.on_loss = on_text, on_phase, on_loss
        self.deal = Deal.of(preparation.units, how.part.count if how.part else 1)
        self.mine: Iterable[Unit] = [u for u in preparation.units if self.deal.has(how.part, u)]
        self.divider = Divider(work, preparation.settings.reading.wanted, copy_prefix(how.part))
        sampled: Sequence[Unit] = preparation.units
        if stream is not None:
            assert preparation.stdin is not None
            units = stdin_units(stream, preparation.stdin, work)
            sampled = list(islice(units, 1))
            self.mine = chain(sampled, units)
        self.sampled = sampled
        saved = work / TOKENIZER
        preparation.tokenizer.save(saved)
        self.context = Context(
            folder,
            str(saved),
            json_sha256(preparation.decisions()),
            preparation.settings,
            how.max_bad_fraction,
        )
        self.handed: list[_Remembered] = []
        self.signed = 0  # units
        self.encoders: Encoders = {}
        self.worker = Worker(self.context, on_text, preparation.tokenizer, self.encoders)

    def run(self) -> PrepareResult:
        """Both passes, and the manifest."""
        executor = self._executor()
        try:
            encoder, reason = self._choose_encoder()  # while the executor starts
            self.encoders[encoder.name] = encoder
            if self.preparation.settings.dedup is not None and not self._find_duplicates(executor):
                return PrepareResult(None, units=self.signed, encoder=f"{encoder.name}, {reason}", signed_only=True)
            self.on_phase("tokenizing")
            results: list[tuple[Unit, UnitResult]] = []
            units = self._handed_out(lambda unit: self.worker.finished(unit) is not None)
            for result in executor.run("tokenize", units, encoder.name):
                if result.reused:
                    self.on_text(result.text_bytes)
                results.append((units.by_place[result.place], result))
                units.done(result.place)
        finally:
            executor.close()
            for handed in self.handed:  # after an error: nobody reads the copies any more
                handed.clear()
        results.sort(key=lambda pair: pair[0].place)
        shards = None
        if self.how.part is None:
            complete(self.preparation, self.folder, results, self._digests(), self.how.max_bad_fraction)
            shutil.rmtree(self.work)
            shards = ShardSet.open(self.folder)
        fresh = [result for _, result in results if not result.reused]
        return PrepareResult(
            shards,
            units=len(results),
            units_reused=len(results) - len(fresh),
            documents=sum(result.documents for result in fresh),
            text_bytes=sum(result.text_bytes for result in fresh),
            encoder=f"{encoder.name}, {reason}",
            fell_back=tuple(result.fell_back for result in fresh if result.fell_back),
        )

    def _handed_out(self, finished: Callable[[Unit], bool]) -> _Remembered:
        """This call's units, divided ones in parts. ``finished``: those of which no copy is needed."""
        part = self.how.part

        def units() -> Iterator[Unit]:
            for unit in self.mine:
                if unit.divide:
                    yield from self.divider.parts(unit, lambda each: self.deal.has(part, each), finished)
                else:
                    yield unit

        self.handed.append(_Remembered(units()))
        return self.handed[-1]

    def _digests(self) -> dict[int, str]:
        """Of the pieces of divided units, by the number of the unit."""
        divided = [unit for unit in self.preparation.units if unit.divide]
        found = {unit.number: self.divider.known(unit) for unit in divided}
        return {number: division.digest for number, division in found.items() if division is not None}

    def _choose_encoder(self) -> EncoderChoice:
        tokenizer, reading = self.preparation.tokenizer, self.preparation.settings.reading
        sample = _sample(self.sampled, reading)
        found = loss(tokenizer, sample)
        if found is not None:
            self.on_loss(found)
        return choose_encoder(tokenizer, self.how.backend, sample, token_dtype(tokenizer.vocab_size))

    def _executor(self) -> Executor:
        if self.how.ray is not None:
            return OnRay(self.context, self.how.ray, self.on_text)
        workers = self.how.workers
        if isinstance(self.mine, Sequence):
            workers = min(workers, sum(unit.about_parts for unit in self.mine))
        if workers > 1:
            return Processes(self.worker, workers, self.on_text)
        return InProcess(self.worker)

    def _find_duplicates(self, executor: Executor) -> bool:
        """Sign this call's units; if all units are signed, leave for each which documents to drop, else False."""
        dedup = self.preparation.settings.dedup
        assert dedup is not None
        self.on_phase("signing")
        handed = self._handed_out(self.worker.is_signed)
        for signed in executor.run("sign", handed):
            self.signed += 1
            handed.done(signed.place)
        divided = [self.divider.all_parts(unit) for unit in self.preparation.units]
        units = [part for parts in divided for part in parts or ()]
        files = [self.worker.signatures(unit) for unit in units]
        if None in divided or not all(file.exists() for file in files):
            return False
        self.on_phase("comparing")
        key = json_sha256(dedup.spec, [file.name for file in files])
        done = self.work / "drops.json"
        try:
            if json.loads(done.read_bytes())["key"] == key:
                return True
        except (FileNotFoundError, ValueError):
            pass
        for unit, drop in zip(units, find_duplicates(files, dedup), strict=True):
            buffer = io.BytesIO()
            np.save(buffer, drop)
            write_atomic(self.worker.drops_file(unit), buffer.getvalue(), shared=True)
        write_atomic(done, json.dumps({"key": key}).encode(), shared=True)
        return True


def _sample(units: Sequence[Unit], reading: Reading) -> list[str]:
    """The beginnings of a few units that lie far apart, :data:`SAMPLE_BYTES` together."""
    chosen = [units[i] for i in sorted({i * len(units) // 8 for i in range(8)})] if units else []
    texts: list[str] = []
    for unit in chosen:
        size = 0
        for document in read_piece(unit.pieces[0], reading, Tally(max_bad_fraction=1.0)):
            # The beginning of one huge document is sample enough.
            texts.append(document.text[:SAMPLE_BYTES])
            size += document.size
            if size * len(chosen) >= SAMPLE_BYTES:
                break
    return texts


class _Remembered:
    """Hands out units, which may come from a stream, and remembers them until they are done."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._units = units
        self.by_place: dict[tuple[int, int], Unit] = {}

    def __iter__(self) -> Iterator[Unit]:
        for unit in self._units:
            self.by_place[unit.place] = unit
            yield unit

    def done(self, place: tuple[int, int]) -> None:
        """A unit's spooled text, if there is any, goes."""
        unit = self.by_place[place]
        remove_copy(unit)
        for piece in unit.pieces:
            if piece.name == STDIN:
                Path(piece.location).unlink(missing_ok=True)

    def clear(self) -> None:
        """All copies of parts go."""
        for unit in self.by_place.values():
            remove_copy(unit)
