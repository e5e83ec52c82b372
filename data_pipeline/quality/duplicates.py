"""Duplicate documents over a whole corpus, exact or near, found from signatures of the single documents.

Two passes. Each unit's documents are signed (:meth:`Dedup.sign`) and saved as one ``.npy`` file; then
:func:`find_duplicates` reads all the files and says which documents to drop. The first document of each group, in the
corpus's order, stays. The result depends on the documents and their order alone, not on the units they are cut into.

``exact``: documents of equal text, exactly as it will be tokenized, by XXH3-128 of its UTF-8. Two different documents
of 10^9 have equal hashes with probability 10^-21.

``near:threshold=0.8,permutations=128,ngram=5``: exact copies first. Of the rest, documents whose sets of word n-grams
have a Jaccard similarity s of at least ``threshold``. It is estimated from ``permutations`` MinHash values, with a
standard deviation of sqrt(s (1 - s) / permutations): 0.035 at 0.8. Similarity is passed on: of A like B like C one
stays, be A like C or not. The procedure of Lee et al. 2022 (arXiv 2107.06499, appendix A) and of datatrove, and as
there a pair can be missed: see :func:`data_pipeline.quality.minhash.bands`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.quality import minhash
from data_pipeline.quality.signatures import SignatureFiles, equal_pairs, rows_at_once
from data_pipeline.quality.values import nearest, plain

MAX_BYTES = 1 << 30
_EXACT_WIDTH = 2
_OPTIONS = ("threshold", "permutations", "ngram")


@dataclass(frozen=True)
class Dedup:
    """What counts as a duplicate. The last three settings are those of ``near``."""

    method: Literal["exact", "near"]
    threshold: float = 0.8
    permutations: int = 128
    ngram: int = 5

    @classmethod
    def parse(cls, spec: str) -> Dedup:
        """Read ``exact``, ``near``, or ``near:`` with settings. :class:`UserError` for anything else.

        Also if ``near`` is asked for and datasketch is not installed.
        """
        method, colon, rest = spec.strip().partition(":")
        if method == "exact" and not colon:
            return cls("exact")
        if method != "near":
            raise UserError(f"dedup {spec!r}: write exact, near, or near:threshold=0.8,permutations=128,ngram=5")
        settings: dict[str, str] = {}
        for part in rest.split(",") if rest.strip() else ():
            name, _, value = (word.strip() for word in part.partition("="))
            if name not in _OPTIONS:
                known = ", ".join(_OPTIONS)
                raise UserError(
                    f"dedup {spec!r}: there is no setting {name!r}{nearest(name, _OPTIONS)}. Known: {known}"
                )
            if name in settings:
                raise UserError(f"dedup {spec!r}: {name} is given twice")
            settings[name] = value
        dedup = cls(
            "near",
            _threshold(settings.get("threshold", "0.8"), spec),
            _whole("permutations", settings.get("permutations", "128"), spec, 16, 1024),
            _whole("ngram", settings.get("ngram", "5"), spec, 1, 100),
        )
        if dedup.permutations % 2:
            raise UserError(f"dedup {spec!r}: permutations must be even, got {dedup.permutations}")
        minhash.require_datasketch()
        return dedup

    @property
    def spec(self) -> str:
        """Canonical writing: equal settings give equal text, and :meth:`parse` reads it."""
        if self.method == "exact":
            return "exact"
        return f"near:threshold={plain(self.threshold)},permutations={self.permutations},ngram={self.ngram}"

    @property
    def width(self) -> int:
        """Numbers of 64 bits in a signature: 2 for the exact hash, then MinHash values, two in one."""
        return _EXACT_WIDTH if self.method == "exact" else _EXACT_WIDTH + self.permutations // 2

    def sign(self, texts: Sequence[str]) -> np.ndarray:
        """Signatures of documents, uint64 (documents, :attr:`width`), equal in every process and on every machine."""
        signatures = np.empty((len(texts), self.width), dtype="<u8")
        digests = b"".join(xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in texts)
        signatures[:, :_EXACT_WIDTH] = np.frombuffer(digests, dtype=">u8").reshape(-1, _EXACT_WIDTH)
        if self.method == "near":
            values = minhash.sign(texts, self.permutations, self.ngram).astype("<u4")
            signatures[:, _EXACT_WIDTH:] = values.view("<u8")
        return signatures


@dataclass(frozen=True, eq=False)
class Duplicates:
    """The outcome over a corpus. A document's number counts through the units in order.

    ``kept[i]`` is the number of the document that stays for document i: i itself if i stays. ``exact_copies`` is how
    many of the dropped have the very text of a document before them.
    """

    files: SignatureFiles
    kept: np.ndarray
    exact_copies: int

    @property
    def drop(self) -> list[np.ndarray]:
        """For each unit a bool array (documents of the unit,): True for those to drop."""
        dropped = self.kept != np.arange(len(self.kept))
        return np.split(dropped, np.cumsum(self.files.counts)[:-1]) if self.files.counts else []

    @property
    def dropped(self) -> int:
        return int(np.count_nonzero(self.kept != np.arange(len(self.kept))))

    def group_sizes(self) -> np.ndarray:
        """The sizes of the groups of two or more documents, the largest first, int64."""
        sizes = np.bincount(self.kept, minlength=len(self.kept))
        return np.sort(sizes[sizes > 1])[::-1]

    def examples(self, count: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Up to ``count`` dropped documents, spread over the corpus, each with the one kept, as (unit, row)."""
        dropped = np.flatnonzero(self.kept != np.arange(len(self.kept)))
        chosen = dropped[np.linspace(0, len(dropped) - 1, min(count, len(dropped))).astype(np.int64)]
        return [(self.files.locate(number), self.files.locate(int(self.kept[number]))) for number in chosen.tolist()]


def find_duplicates(signatures: Sequence[Path], dedup: Dedup, max_bytes: int = MAX_BYTES) -> list[np.ndarray]:
    """For each signature file (one a unit, in the corpus's order) a bool array (documents,): True for those to drop.

    See :func:`duplicate_groups`, which says more about what was found.
    """
    return duplicate_groups(signatures, dedup, max_bytes).drop


def duplicate_groups(signatures: Sequence[Path], dedup: Dedup, max_bytes: int = MAX_BYTES) -> Duplicates:
    """Read the signature files and group the documents.

    About ``max_bytes`` of signatures and keys are in memory at a time, and beside them a few 64-bit numbers for each
    document and, for ``near``, for each candidate pair. The result does not depend on ``max_bytes``; less of it means
    more passes over the files. :class:`UserError` for files that are damaged or come from other settings.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    files = SignatureFiles(signatures, dedup.width)
    kept = np.arange(files.documents)
    for pairs in equal_pairs(files, lambda block, _: block[:, :_EXACT_WIDTH], 1, max_bytes):
        kept[pairs[:, 1]] = pairs[:, 0]
    unique = kept == np.arange(files.documents)
    exact_copies = int(np.count_nonzero(~unique))
    if dedup.method == "near":
        stands_for = np.arange(files.documents)
        documents, first = _components(_similar(files, _candidates(files, dedup, unique, max_bytes), dedup, max_bytes))
        stands_for[documents] = first
        kept = stands_for[kept]
    return Duplicates(files, kept, exact_copies)


def _candidates(files: SignatureFiles, dedup: Dedup, unique: np.ndarray, max_bytes: int) -> np.ndarray:
    """Distinct pairs (earlier, later) that agree in a band, of the documents ``unique``; int64 (pairs, 2)."""
    count, rows = minhash.bands(dedup.threshold, dedup.permutations)

    def keys(block: np.ndarray, band: int) -> np.ndarray:
        return minhash.band_keys(_minhashes(block), band, rows)[:, None]

    coded = np.empty(0, dtype=np.int64)  # a pair as one number: np.unique of numbers is a plain sort
    for pairs in equal_pairs(files, keys, count, max_bytes, unique):
        coded = np.unique(np.concatenate([coded, pairs[:, 0] * files.documents + pairs[:, 1]]))
    return np.stack(np.divmod(coded, max(1, files.documents)), axis=1)


def _similar(files: SignatureFiles, pairs: np.ndarray, dedup: Dedup, max_bytes: int) -> np.ndarray:
    """Those of ``pairs`` whose estimated Jaccard similarity reaches the threshold."""
    rows = rows_at_once(max_bytes, files.width)
    verified = [pairs[:0]]
    for start in range(0, len(pairs), rows):
        some = pairs[start : start + rows]
        equal = _minhashes(files.gather(some[:, 0])) == _minhashes(files.gather(some[:, 1]))
        verified.append(some[equal.mean(axis=1) >= dedup.threshold])
    return np.concatenate(verified)


def _components(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents of ``pairs``, ascending, and for each the first document it is joined to by any chain of pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    documents, nodes = np.unique(pairs, return_inverse=True)
    ends = nodes.reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs), dtype=np.int8), (ends[0], ends[1])), shape=(len(documents), len(documents)))
    labels = connected_components(graph, directed=False)[1]
    first = np.unique(labels, return_index=True)[1]  # documents ascend, so the first index is the earliest document
    return documents, documents[first[labels]]


def _minhashes(signatures: np.ndarray) -> np.ndarray:
    """The MinHash values in signatures, uint32 (documents, permutations)."""
    return np.ascontiguousarray(signatures[:, _EXACT_WIDTH:]).view("<u4")


def _threshold(text: str, spec: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UserError(f"dedup {spec!r}: threshold must be a number between 0 and 1, both left out, got {text!r}")
    return value


def _whole(name: str, text: str, spec: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UserError(f"dedup {spec!r}: {name} must be a whole number from {least} to {most}, got {text!r}")
    return int(text)
