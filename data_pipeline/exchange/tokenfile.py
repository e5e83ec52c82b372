"""What a file of tokens that another program wrote consists of, and the check of its ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.sources.pieces import Piece
from data_pipeline.tokenization.tokenizer import Tokenizer


class TokenDocument(NamedTuple):
    """A document as it stands in the file, end token and all."""

    number: int | None  # from 0 in the file; None where only counting would tell
    offset: int  # bytes from the beginning of the file to its first token
    ids: np.ndarray  # (n,) in the file's own dtype


@dataclass(frozen=True)
class TokenFormat:
    """How to read token files, as far as the files do not say it themselves."""

    token_size: int | None = None  # bytes, of .ds files without an index
    split_at: int | None = None  # the id that ends documents, for .ds files without an index
    ignore_loss: bool = False  # read .ds files whose loss mask hides tokens

    def facts(self) -> dict[str, int | bool | None]:
        """As JSON values, for the manifest."""
        return {"token_size": self.token_size, "ignore_loss": self.ignore_loss}


class TokenFile(Protocol):
    """A file of tokens and the files that describe it, opened and checked but for the ids."""

    path: Path
    described_by: tuple[Path, ...]
    """The other files that were read: index, metadata, loss."""
    dtype: np.dtype
    tokens: int
    documents: int | None
    """As the index says; None without one."""

    def pieces(self, name: str, target_bytes: int) -> list[Piece]:
        """The file cut at documents into pieces of about ``target_bytes``, which tile its bytes."""
        ...

    def read(self, piece: Piece) -> Iterator[TokenDocument]:
        """The documents that begin in a piece, in order."""
        ...


class IdCheck:
    """Finds ids that are not in the vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.size = tokenizer.vocab_size
        known = np.zeros(self.size, dtype=bool)
        known[list(tokenizer.vocabulary().values())] = True
        self._known = None if known.all() else known  # ids without a token are rare

    def check(self, document: TokenDocument, path: str) -> None:
        """Raise :class:`UserError` naming file, document and byte for an id outside the vocabulary."""
        ids = document.ids
        if not len(ids):
            return
        if int(ids.min()) >= 0 and int(ids.max()) < self.size and (self._known is None or self._known[ids].all()):
            return
        wide = ids.astype(np.int64)
        wrong = (wide < 0) | (wide >= self.size)
        if self._known is not None:
            wrong |= ~self._known[np.clip(wide, 0, self.size - 1)]
        at = int(np.argmax(wrong))
        raise UserError(
            f"{place(document, path)}: token {at} (byte {document.offset + at * ids.itemsize:,}) is id {wide[at]}, "
            f"which the vocabulary of {self.size:,} does not have; give the tokenizer that the file was made with"
        )


def place(document: TokenDocument, path: str) -> str:
    """Where a document is, for messages."""
    number = "" if document.number is None else f"document {document.number:,} "
    return f"{path}, {number}at byte {document.offset:,}"


class IdsHash:
    """A hash over documents of token ids, the same however many are given at a time and in whatever dtype."""

    def __init__(self) -> None:
        self.documents = self.tokens = 0
        self._ids, self._lengths = xxhash.xxh3_128(), xxhash.xxh3_128()

    def update(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Take in documents laid end to end: ``ids`` (sum of ``lengths``,), ``lengths`` (documents,)."""
        self._ids.update(np.ascontiguousarray(ids, dtype="<u4").data.cast("B"))
        self._lengths.update(np.ascontiguousarray(lengths, dtype="<u8").data.cast("B"))
        self.documents += len(lengths)
        self.tokens += len(ids)

    def hexdigest(self) -> str:
        """XXH3-128 (hex) of ids and lengths."""
        return xxhash.xxh3_128_hexdigest(self._ids.digest() + self._lengths.digest())


def map_file(path: Path, dtype: np.dtype | str, offset: int = 0, count: int | None = None) -> np.ndarray:
    """``count`` values of a file from byte ``offset`` on, mapped read-only; an empty array where there are none.

    Raises :class:`UserError` if the file cannot be read.
    """
    dtype = np.dtype(dtype)
    try:
        left = (path.stat().st_size - offset) // dtype.itemsize
        count = left if count is None else count
        if count > left:
            raise UserError(f"{path} is cut short: it has room for {left:,} values of {dtype.name}, not {count:,}")
        if not count:
            return np.empty(0, dtype)
        # A plain array: np.memmap's own slicing costs several times as much, and documents are many.
        return np.asarray(np.memmap(path, dtype, "r", offset, (count,)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
