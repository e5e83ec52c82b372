"""Held-out text as one stream of tokens, from prepared shards or tokenized from text on the fly."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.sources.corpus import HubCorpus, open_dataset
from data_pipeline.sources.documents import iter_documents
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.tally import Tally
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.subject import Subject
from eval.tasks.language_modeling import TextSettings
from eval.tasks.language_modeling.spans import Aligner, Ints, Spans

_BATCH = 256  # documents tokenized in one call
_KEPT = 64  # documents whose spans are kept


class Stream(ABC):
    """Tokens of the documents in order, each with its end-of-document token, as shards hold them.

    ``edges`` (D + 1,) int64: the position of each document's first token, and the length of the stream. ``name`` is
    for messages.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, edges: Ints, record_chars: int) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.edges = edges
        self.spans = lru_cache(_KEPT)(self._spans)
        self._aligner = Aligner(tokenizer, record_chars)

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return int(self.edges[-1])

    @property
    def num_documents(self) -> int:
        """Documents in it."""
        return len(self.edges) - 1

    @abstractmethod
    def read(self, starts: Ints, length: int) -> Ints:
        """Rows of ``length`` consecutive tokens at ``starts`` (R,), as (R, length) int64."""

    @abstractmethod
    def chunks(self) -> Iterator[NDArray[Any]]:
        """All tokens once, in pieces that fit into memory."""

    @abstractmethod
    def text(self, document: int) -> str:
        """A document's text: the original, or what its tokens decode to."""

    def counts(self, vocab_size: int) -> Ints:
        """How often each token occurs in all of the stream, (vocab_size,)."""
        found = np.zeros(vocab_size, dtype=np.int64)
        for chunk in self.chunks():
            found += np.bincount(chunk, minlength=vocab_size)
        return found

    def rows(self, starts: Ints, sizes: Ints) -> Ints:
        """Rows of ``sizes`` (R,) consecutive tokens at ``starts`` (R,), as (R, longest) int64, filled up on the right
        with the document's end: a special token, which no noise makes a target."""
        longest = int(sizes.max())
        if int(sizes.min()) == longest:
            return self.read(starts, longest)
        out = np.full((len(starts), longest), self.tokenizer.eos_id, dtype=np.int64)
        for row, start, size in zip(out, starts.tolist(), sizes.tolist(), strict=True):
            row[:size] = self.range(start, start + size)
        return out

    def range(self, begin: int, end: int) -> Ints:
        """The tokens of [begin, end), (end - begin,) int64."""
        return self.read(np.array([begin]), end - begin)[0] if end > begin else np.zeros(0, dtype=np.int64)

    def document(self, number: int) -> Ints:
        """A document's tokens without its end, (n,) int64."""
        return self.range(int(self.edges[number]), int(self.edges[number + 1]) - 1)

    def _spans(self, number: int) -> Spans:
        return self._aligner.spans(self.document(number), self.text(number))


class ShardStream(Stream):
    """The stream of a shard set. Its text is decoded: what the tokenizer dropped is not counted."""

    def __init__(self, shards: ShardSet, tokenizer: Tokenizer, record_chars: int) -> None:
        parts, before = [np.zeros(1, dtype=np.int64)], 0
        for entry in shards.manifest.shards:
            parts.append(shards.document_ends(entry.index).astype(np.int64) + before)
            before += entry.num_tokens
        super().__init__(str(shards.path), tokenizer, np.concatenate(parts), record_chars)
        self._shards = shards

    def read(self, starts: Ints, length: int) -> Ints:
        """See :class:`Stream`."""
        return self._shards.read(starts, length)

    def chunks(self) -> Iterator[NDArray[Any]]:
        """See :class:`Stream`."""
        return self._shards.chunks()

    def text(self, document: int) -> str:
        """See :class:`Stream`."""
        return self.tokenizer.decode(self.document(document).tolist())


class TextStream(Stream):
    """Texts, tokenized here and held in memory."""

    def __init__(self, name: str, texts: list[str], tokenizer: Tokenizer, record_chars: int) -> None:
        rows: list[np.ndarray] = []
        for start in range(0, len(texts), _BATCH):
            for ids in tokenizer.encode_batch(texts[start : start + _BATCH]):
                rows.append(np.array([*ids, tokenizer.eos_id], dtype=np.uint32))
        edges = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        super().__init__(name, tokenizer, edges, record_chars)
        self._texts = texts
        self._tokens = np.concatenate(rows)

    def read(self, starts: Ints, length: int) -> Ints:
        """See :class:`Stream`."""
        return np.stack([self._tokens[start : start + length] for start in np.asarray(starts).tolist()]).astype(
            np.int64
        )

    def chunks(self) -> Iterator[NDArray[Any]]:
        """See :class:`Stream`."""
        yield self._tokens

    def text(self, document: int) -> str:
        """See :class:`Stream`."""
        return self._texts[document]


def check_source(settings: TextSettings) -> None:
    """Raises :class:`UserError` for two sources of text, or for options of a dataset without one."""
    if settings.text and settings.dataset:
        raise UserError("held-out text comes from text or from dataset, not from both: leave one out")
    if not settings.dataset and (settings.dataset_config or settings.dataset_revision):
        raise UserError("dataset_config and dataset_revision are of a dataset: say which with dataset")


def open_stream(subject: Subject, settings: TextSettings, record_chars: int = 0) -> Stream:
    """The stream that the settings name, else that of the subject's held-out shards.

    Raises :class:`UserError` for text that cannot be read or has nothing to predict, and without any held-out text.
    """
    tokenizer = subject.loaded.tokenizer
    stream: Stream
    if settings.text or settings.dataset:
        texts = _texts(settings)
        stream = TextStream(_name(settings), texts, tokenizer, record_chars)
    else:
        stream = ShardStream(subject.held_out(), tokenizer, record_chars)
    if stream.num_tokens < 2:
        raise UserError(f"{stream.name} holds {stream.num_tokens} tokens: nothing to predict")
    return stream


def resolve_documents(subject: Subject, chosen: Literal["auto", "apart", "stream"]) -> Literal["apart", "stream"]:
    """What ``documents`` means for this model: rows of whole documents see no other one, in training and so here."""
    if chosen == "auto":
        return "apart" if subject.loaded.run_config.data.packing == "documents" else "stream"
    return chosen


def describe_source(subject: Subject, settings: TextSettings) -> dict[str, Any]:
    """What will be read, with a ``hash``: of shards their fingerprint, of text its content, of a dataset its commit
    (of a folder its files)."""
    if settings.dataset:
        corpus = _dataset(settings)
        pinned = asdict(corpus.dataset) | {"dataset": corpus.dataset.name}
        facts = [pinned, settings.text_field, settings.text_unit, *(other.split for other in corpus.also)]
        return {
            "dataset": corpus.describe().removeprefix("dataset "),
            "hash": _sha256([json.dumps(facts, sort_keys=True)]),
        }
    if settings.text:
        texts = _texts(settings)
        return {
            "text": list(settings.text),
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "hash": _sha256(texts),
        }
    shards = subject.held_out()
    return {
        "path": str(shards.path),
        "tokens": shards.num_tokens,
        "documents": shards.num_documents,
        "hash": shards.fingerprint,
    }


def _texts(settings: TextSettings) -> list[str]:
    reading = Reading(text_field=settings.text_field, text_unit=settings.text_unit, quotes=settings.quotes)
    source = _dataset(settings) if settings.dataset else list(settings.text)
    # No broken record is passed over: a loss is that of the whole text.
    texts = [document.text for document in iter_documents(source, reading, Tally(max_bad_fraction=0))]
    if not texts:
        raise UserError(f"{_name(settings)} has no text in '{settings.text_field}'")
    return texts


def _dataset(settings: TextSettings) -> HubCorpus:
    assert settings.dataset is not None
    return open_dataset(settings.dataset, settings.dataset_config, settings.dataset_split, settings.dataset_revision)


def _name(settings: TextSettings) -> str:
    return f"dataset {settings.dataset}" if settings.dataset else f"text {' '.join(settings.text)}"


def _sha256(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
