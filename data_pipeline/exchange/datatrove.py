"""datatrove's token files: NAME.ds holds tokens, NAME.ds.index the ends of documents.

The layout is that of ``datatrove/pipeline/tokens/tokenizer.py``, little-endian throughout. The .ds is a stream of
tokens of 2 or 4 bytes (uint16, uint32), with an end token behind each document if the writer was given one. Beside it
may lie NAME.ds.index (uint64 for each document: its end, counted in tokens), NAME.ds.metadata (text: the tokenizer's
name, a bar and the bytes of a token; the number of tokens; the same for people), and NAME.ds.loss (a byte for each
token, 0 where it is no target).
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.exchange.tokenfile import TokenDocument, TokenFormat, map_file
from data_pipeline.sources.pieces import Piece, cuts

KIND = "datatrove"
SIZES = {2: "<u2", 4: "<u4"}
_AT_ONCE = 1 << 18  # entries of the index, or tokens, that are looked at together


class DatatroveFile:
    """A .ds file and what lies beside it. The ids themselves are not looked at.

    Without an index, documents end with the token ``form.split_at``, and the size of a token is that of the metadata
    or of ``form``. Raises :class:`UserError` where neither is known, for files that do not fit each other, for an
    empty file, and for a loss mask that hides tokens unless ``form.ignore_loss``. ``checked`` says that all of this was
    seen before.
    """

    def __init__(self, path: Path, form: TokenFormat, checked: bool = False) -> None:
        self.path, self._form = path, form
        index, metadata, loss = (path.with_name(path.name + end) for end in (".index", ".metadata", ".loss"))
        self.described_by = tuple(p for p in (index, metadata, loss) if p.is_file())
        size = path.stat().st_size
        if not size:
            raise UserError(f"{path} is empty")
        told = _metadata(metadata) if metadata.is_file() else None
        self._ends = _index(index) if index.is_file() else None
        self.dtype = np.dtype(SIZES[self._token_size(size, told)])
        self.tokens = size // self.dtype.itemsize
        self.documents = None if self._ends is None else len(self._ends)
        if size % self.dtype.itemsize or (told is not None and told[1] != self.tokens):
            says = "" if told is None else f", its metadata says {told[1]:,} tokens"
            raise UserError(f"{path} has {size:,} bytes, tokens of {self.dtype.itemsize} bytes{says}: it was cut short")
        if not checked:
            self._check_index(index)
            self._check_loss(loss)
        self._tokens = map_file(path, self.dtype)

    def _token_size(self, size: int, told: tuple[int, int] | None) -> int:
        path, form = self.path, self._form
        counted = None
        if self._ends is not None:
            counted, left = divmod(size, int(self._ends[-1])) if int(self._ends[-1]) else (0, 1)
            if left or counted not in SIZES:
                raise UserError(
                    f"{path} has {size:,} bytes, its index ends at token {int(self._ends[-1]):,}, and tokens have 2 or "
                    "4 bytes: one of the two was cut short or changed"
                )
        known = {"the index": counted, "the metadata": told and told[0], "--token-size": form.token_size}
        found = {name: value for name, value in known.items() if value is not None}
        if len(set(found.values())) > 1:
            says = ", ".join(f"{value} by {name}" for name, value in found.items())
            raise UserError(f"{path}: bytes of a token are {says}")
        if not found:
            raise UserError(
                f"{path} has neither .index nor .metadata beside it, so that the bytes of a token are not known: give "
                "--token-size 2 (vocabularies of up to 65,536 tokens) or 4"
            )
        token_size = next(iter(found.values()))
        if token_size not in SIZES:
            raise UserError(f"{path}: tokens have 2 or 4 bytes, not {token_size} as {next(iter(found))} says")
        if self._ends is None and form.split_at is None:
            raise UserError(
                f"{path} has no .index beside it, so only an end token tells where documents end: name it with "
                "--end-token"
            )
        return int(token_size)

    def _check_index(self, path: Path) -> None:
        if self._ends is None:
            return
        last = 0
        for start in range(0, len(self._ends), _AT_ONCE):
            part = np.append(last, self._ends[start : start + _AT_ONCE].astype(np.int64))
            if (np.diff(part) < 0).any():
                at = start + int(np.argmax(np.diff(part) < 0))
                raise UserError(f"{path} is damaged: document {at:,} ends before the one in front of it")
            last = int(part[-1])

    def _check_loss(self, path: Path) -> None:
        if not path.is_file() or self._form.ignore_loss:
            return
        loss = map_file(path, "u1")
        if len(loss) != self.tokens:
            raise UserError(f"{path} has {len(loss):,} bytes for {self.tokens:,} tokens: it was cut short")
        steps = range(0, len(loss), _AT_ONCE)
        hidden = sum(int(np.count_nonzero(loss[start : start + _AT_ONCE] == 0)) for start in steps)
        if hidden:
            raise UserError(
                f"{path}: {hidden:,} of {len(loss):,} tokens are no targets, and shards keep no loss mask; with "
                "--ignore-loss all tokens become targets"
            )

    def pieces(self, name: str, target_bytes: int) -> list[Piece]:
        """See :class:`~data_pipeline.exchange.tokenfile.TokenFile`. ``rows`` are the documents; without an index the
        documents are those that begin in the piece."""
        each, location, total = self.dtype.itemsize, str(self.path), self.tokens * self.dtype.itemsize
        if self._ends is None:
            places = [(begin * each, end * each) for begin, end in cuts(self.tokens, max(1, target_bytes // each))]
            return [Piece(name, location, KIND, a, b, None, b - a, total) for a, b in places]
        ends, edges = self._ends, [0]

        def begin(document: int) -> int:
            return int(ends[document - 1]) * each if document else 0

        while edges[-1] < len(ends):
            full = begin(edges[-1]) + target_bytes
            edges.append(bisect_left(range(len(ends)), full, lo=edges[-1] + 1, key=begin))
        rows = list(itertools.pairwise(edges))
        places = [(begin(a), begin(b)) for a, b in rows]
        return [
            Piece(name, location, KIND, *at, row, at[1] - at[0], total) for at, row in zip(places, rows, strict=True)
        ]

    def read(self, piece: Piece) -> Iterator[TokenDocument]:
        """See :class:`~data_pipeline.exchange.tokenfile.TokenFile`."""
        each = self.dtype.itemsize
        if piece.rows is None:
            yield from self._split(piece.begin // each, piece.end // each)
            return
        assert self._ends is not None
        first, stop = piece.rows
        begin = int(self._ends[first - 1]) if first else 0
        for start in range(first, stop, _AT_ONCE):
            for number, end in enumerate(self._ends[start : min(stop, start + _AT_ONCE)].tolist(), start):
                yield TokenDocument(number, begin * each, self._tokens[begin:end])
                begin = end

    def _split(self, begin: int, end: int) -> Iterator[TokenDocument]:
        """The documents that begin in tokens ``[begin, end)``, each up to and with its end token."""
        if begin and self._tokens[begin - 1] != self._form.split_at:
            begin = self._next_end(begin)
        while begin < end:
            stop = self._next_end(begin)
            yield TokenDocument(None, begin * self.dtype.itemsize, self._tokens[begin:stop])
            begin = stop

    def _next_end(self, begin: int) -> int:
        """The place behind the first end token from ``begin`` on, or the end of the file."""
        size = 1 << 10
        while begin < self.tokens:
            found = np.flatnonzero(self._tokens[begin : begin + size] == self._form.split_at)
            if len(found):
                return begin + int(found[0]) + 1
            begin, size = begin + size, min(2 * size, _AT_ONCE)
        return self.tokens


def _index(path: Path) -> np.ndarray:
    if path.stat().st_size % 8 or not path.stat().st_size:
        raise UserError(f"{path} is damaged: {path.stat().st_size:,} bytes are no list of 64-bit numbers")
    return map_file(path, "<u8")


def _metadata(path: Path) -> tuple[int, int]:
    """Bytes of a token, and tokens."""
    try:
        first, count = path.read_text(encoding="utf-8").splitlines()[:2]
        return int(first.rpartition("|")[2]), int(count)
    except (OSError, ValueError):
        raise UserError(f"{path} is not metadata of datatrove (tokenizer|bytes of a token, then the tokens)") from None
