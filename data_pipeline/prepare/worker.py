"""What one process does with one unit: read, filter, sign for the search for duplicates, tokenize, write.

A unit's result depends on nothing but the unit, so any process may do it, at any time, twice if need be. The result
is left as a small record in the work folder, after the files it speaks of.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from data_pipeline.prepare.plan import Settings, Unit, json_sha256
from data_pipeline.shards.manifest import ShardEntry, parse_shard
from data_pipeline.shards.shardset import check_size
from data_pipeline.shards.writer import UnitWriter, token_dtype
from data_pipeline.sources.documents import Document, read_piece
from data_pipeline.sources.tally import Tally
from data_pipeline.tokenization.bytepairs import NotExpressible
from data_pipeline.tokenization.encoder import CheckedEncoder, Encoder, ParityError, make_encoder
from data_pipeline.tokenization.tokenizer import Tokenizer

WORK = ".work"
DUPLICATE = "duplicate"
_BATCH_BYTES = 1 << 20  # text handed to the tokenizer at once: enough for all cores, little memory
_SAMPLES = 5  # dropped documents kept aside, for each reason in each unit
_EXCERPT = 200  # characters
# Broken records that a unit may have whatever their share, which is judged over all units in the end. A unit of books
# has few records, and one of them that is not UTF-8 is no reason to stop a long run.
_UNIT_SLACK = 10


@dataclass(frozen=True)
class Context:
    """What every process of a run is told."""

    folder: Path
    tokenizer: str  # the folder it was saved to, inside the work folder
    decisions: str  # hash of all that decides bytes besides the inputs
    settings: Settings
    max_bad_fraction: float

    def worker(self, on_text: Callable[[int], None]) -> Worker:
        """What does the units in another process."""
        return Worker(self, on_text)


@dataclass
class UnitResult:
    """What a finished unit, or part of one, wrote and saw; also its record in the work folder."""

    number: int
    key: str
    part: int | None = None
    shards: tuple[ShardEntry, ...] = ()
    documents: int = 0
    text_bytes: int = 0
    records: int = 0
    empty: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    bad_samples: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_samples: list[dict[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)  # of the unit's pieces
    fell_back: str | None = None  # why the faster encoder was left
    reused: bool = False  # found finished; not part of the record

    @property
    def place(self) -> tuple[int, int]:
        """That of the unit."""
        return self.number, self.part or 0


class Signed(NamedTuple):
    """A unit, or part of one, whose documents are signed."""

    place: tuple[int, int]
    text_bytes: int  # that were read


Encoders = dict[str, Encoder]
"""By the backend's name."""


class Worker:
    """Does units. ``on_text`` is called with the bytes of text that were just done; ``tokenizer`` and ``encoders`` are
    what the process that started the run has already."""

    result_type: ClassVar[type[UnitResult]] = UnitResult

    def __init__(
        self,
        context: Context,
        on_text: Callable[[int], None] = lambda size: None,
        tokenizer: Tokenizer | None = None,
        encoders: Encoders | None = None,
    ) -> None:
        self.context = context
        self.settings = context.settings
        self.work = context.folder / WORK
        self._on_text = on_text
        self._tokenizer = tokenizer
        self._encoders = {} if encoders is None else encoders

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded when first needed: signing documents needs none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.context.tokenizer)
        return self._tokenizer

    def load(self) -> None:
        """Load the tokenizer now rather than with the first unit."""
        _ = self.tokenizer

    def _encoder(self, backend: str) -> Encoder:
        """Made once in a process (tiktoken's takes a tenth of a second), begun anew for each unit."""
        if backend not in self._encoders:
            dtype = token_dtype(self.tokenizer.vocab_size)
            self._encoders[backend] = make_encoder(self.tokenizer, backend, dtype)
        encoder = self._encoders[backend]
        if isinstance(encoder, CheckedEncoder):
            encoder.reset()
        return encoder

    def key(self, unit: Unit, drops: np.ndarray | None = None) -> str:
        """SHA-256 (hex) of all that decides the shards of a unit."""
        return json_sha256(self.context.decisions, unit.identity, None if drops is None else drops.tobytes().hex())

    # ---- the first pass, when duplicates are to be dropped

    def signatures(self, unit: Unit) -> Path:
        """Where the signatures of the unit's documents lie once they are whole."""
        return self.work / f"signatures-{unit.label}-{self.key(unit)[:16]}.npy"

    def is_signed(self, unit: Unit) -> bool:
        """Whether the unit's signatures are there."""
        return self.signatures(unit).exists()

    def sign(self, unit: Unit) -> Signed:
        """Read the unit and leave a signature of each document that passes the filters."""
        dedup = self.settings.dedup
        assert dedup is not None
        file, read = self.signatures(unit), 0
        if not file.exists():
            parts = []
            tally = self._tally()
            for batch in _batches(self._kept(unit, tally, UnitResult(unit.number, ""))):
                parts.append(dedup.sign([document.text for document in batch]))
                size = sum(document.size for document in batch)
                read += size
                self._on_text(size)
            signatures = np.concatenate(parts) if parts else dedup.sign([])
            with writing(self.context.folder):
                write_atomic(file, _npy(signatures), shared=True)
        return Signed(unit.place, read)

    # ---- the second pass

    def record(self, unit: Unit) -> Path:
        """Where the unit's result lies once its shards are whole."""
        return self.work / f"unit-{unit.label}.json"

    def drops(self, unit: Unit) -> np.ndarray | None:
        """Which of the unit's filtered documents are duplicates (documents,) bool; None if nobody looked."""
        if self.settings.dedup is None:
            return None
        return np.load(self.drops_file(unit))

    def drops_file(self, unit: Unit) -> Path:
        """Where :meth:`drops` lies."""
        return self.work / f"drops-{unit.label}.npy"

    def finished(self, unit: Unit) -> UnitResult | None:
        """The result of a unit whose record and files are there, else None."""
        try:
            drops = self.drops(unit)
            data = json.loads(self.record(unit).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if data["key"] != self.key(unit, drops):
            return None
        result = self.result_type(**{**data, "shards": tuple(parse_shard(entry) for entry in data["shards"])})
        try:
            for shard in result.shards:
                check_size(self.context.folder, shard.tokens)
                check_size(self.context.folder, shard.index)
        except UserError:
            return None
        result.reused = True
        return result

    def tokenize(self, unit: Unit, backend: str) -> UnitResult:
        """The unit's shards and record; those of an earlier call if they are whole. ``backend`` names the encoder."""
        result = self.finished(unit)
        if result is None:
            try:
                result = self._tokenize(unit, backend)
            except (ParityError, NotExpressible) as error:  # also where a node of a cluster lacks tiktoken
                result = self._tokenize(unit, "tokenizers")
                result.fell_back = str(error)
            data = {name: value for name, value in asdict(result).items() if name != "reused"}
            with writing(self.context.folder):
                write_atomic(self.record(unit), json.dumps(data).encode(), shared=True)
        return result

    def _tokenize(self, unit: Unit, backend: str) -> UnitResult:
        tokenizer = self.tokenizer
        dtype = token_dtype(tokenizer.vocab_size)
        encoder = self._encoder(backend)
        drops = self.drops(unit)
        result = UnitResult(unit.number, self.key(unit, drops), unit.part)
        tally = self._tally()
        with writing(self.context.folder):
            writer = UnitWriter(
                self.context.folder,
                unit.number,
                dtype=dtype,
                shard_tokens=self.settings.shard_tokens,
                eos_id=tokenizer.eos_id,
                part=unit.part,
            )
            try:
                for batch in _batches(self._unique(self._kept(unit, tally, result), drops, result)):
                    encoded = encoder.encode_batch([document.text for document in batch])
                    for document, ids in zip(batch, encoded, strict=True):
                        if len(ids):
                            writer.add(ids, document.shown_source)
                            result.documents += 1
                            result.text_bytes += document.size
                        else:  # all that it has is what the tokenizer drops, as control characters
                            result.empty += 1
                    self._on_text(sum(document.size for document in batch))
                result.shards = writer.finish()
            finally:
                writer.abort()
        result.records = tally.records
        result.empty += tally.empty
        result.bad = dict(sorted(tally.bad.items()))
        result.bad_samples = [_moved(asdict(sample), unit) for sample in tally.located()]
        result.dropped_samples = [_moved(sample, unit) for sample in result.dropped_samples]
        return result

    def _tally(self) -> Tally:
        return Tally(max_bad_fraction=self.context.max_bad_fraction)

    def _kept(self, unit: Unit, tally: Tally, result: UnitResult) -> Iterator[Document]:
        """The unit's documents that pass the filters."""
        reason_of = self.settings.filters.reason if self.settings.filters else None
        for piece in unit.pieces:
            for document in read_piece(piece, self.settings.reading, tally):
                reason = reason_of(document.text) if reason_of else None
                if reason is None:
                    yield document
                else:
                    _drop(result, document, reason)
            assert tally.digest is not None
            result.digests.append(tally.digest)
        tally.check(_UNIT_SLACK)

    def _unique(
        self, documents: Iterator[Document], drops: np.ndarray | None, result: UnitResult
    ) -> Iterator[Document]:
        if drops is None:
            yield from documents
            return
        number = -1
        for number, document in enumerate(documents):
            if number < len(drops) and not drops[number]:
                yield document
            else:
                _drop(result, document, DUPLICATE)
        if number + 1 != len(drops):
            raise UserError(
                f"the inputs changed between the search for duplicates and tokenizing (unit {result.number}): start "
                "over with --overwrite"
            )


def _drop(result: UnitResult, document: Document, reason: str) -> None:
    result.dropped[reason] = count = result.dropped.get(reason, 0) + 1
    if count <= _SAMPLES:
        text = document.text
        result.dropped_samples.append(
            {
                "reason": reason,
                "source": document.source,
                "record": document.record,
                "characters": len(text),
                "excerpt": text[:_EXCERPT],
            }
        )


def _moved(sample: dict[str, Any], unit: Unit) -> dict[str, Any]:
    """A sample of standard input, with its line counted from the beginning of the stream."""
    record = sample["record"]
    return {**sample, "record": record + unit.lines_before} if record is not None else sample


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


def sum_counts(counts: Iterator[dict[str, int]]) -> dict[str, int]:
    """The sum of several counts, sorted by name."""
    out: Counter[str] = Counter()
    for each in counts:
        out.update(each)
    return dict(sorted(out.items()))


def _npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusals while writing, a full disk first of all, into one clear message; reading has its
    own."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"writing to {folder} failed: {reason}; what is finished stays, run the command again"
        ) from None
