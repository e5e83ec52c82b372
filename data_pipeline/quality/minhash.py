"""MinHash signatures of documents (Broder 1997) by datasketch, and the bands that find similar ones (LSH).

Similarity is the Jaccard index of two documents' sets of word n-grams. Words are runs of letters, digits and
underscores in lower case; punctuation and white space do not count. A document of fewer than n words is one n-gram of
all its words; one without words is like exact copies of itself only.

The signatures are datasketch's own: its seeded permutations, scheme ``affine32``, 32 bits each. Only the hashes of the
n-grams, which datasketch takes from a function of the user's, are made here, for a whole document at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from datasketch import MinHash

SEED = 1
_WORD = re.compile(r"\w+")
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
# n-grams handed to datasketch at a time: its matrix of 1024 x 128 values stays in the cache (measured: 53 MB/s of
# text; 47 with 4096), and the memory does not grow with the document.
_BATCH = 1024
# What datasketch's search for (bands, rows) weighs: a wrong candidate costs one comparison of signatures, a missed pair
# stays in the corpus.
_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT = 0.05, 0.95


def require_datasketch() -> None:
    """Raise :class:`UserError` unless datasketch 2 can be imported."""
    try:
        from datasketch import MinHash

        MinHash(num_perm=2, scheme="affine32")
    except (ImportError, TypeError):
        raise UserError(
            "near-duplicates need datasketch 2.0 or newer: pip install 'nystrom-pretrain[dedup]', or use 'exact'"
        ) from None


def sign(texts: Sequence[str], permutations: int, ngram: int) -> np.ndarray:
    """MinHash signatures of ``texts``, uint32, (documents, permutations)."""
    empty = _empty(permutations)
    signatures = np.empty((len(texts), permutations), dtype=np.uint32)
    for row, text in enumerate(texts):
        hashes = ngram_hashes(text, ngram).tolist()
        signature = empty.copy()
        for start in range(0, len(hashes), _BATCH):
            signature.update_batch(hashes[start : start + _BATCH])
        signatures[row] = signature.hashvalues
    return signatures


def ngram_hashes(text: str, n: int) -> np.ndarray:
    """32-bit hashes of the word n-grams of ``text`` in order, uint64, at least one."""
    words = _WORD.findall(text.lower())
    if not words:
        return np.array([xxhash.xxh3_64_intdigest(_utf8(text)) >> 32], dtype=np.uint64)
    # Each distinct word is hashed once; the n-gram's hash is a polynomial in its words' hashes, modulo 2^64.
    table = {word: xxhash.xxh3_64_intdigest(_utf8(word)) for word in set(words)}
    hashes = np.fromiter(map(table.__getitem__, words), dtype=np.uint64, count=len(words))
    n = min(n, len(words))
    count = len(words) - n + 1
    combined = hashes[:count].copy()
    for i in range(1, n):
        combined *= _PRIME
        combined += hashes[i : i + count]
    return combined >> np.uint64(32)


@lru_cache(maxsize=8)
def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """How many bands of how many rows: pairs that agree in all the rows of some band are compared.

    datasketch's search: the least weighted sum of the areas of false positives below ``threshold`` and of false
    negatives above it (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, section 3.4). For 0.8 and 128 it is
    16 bands of 8, which meet a pair of similarity s with probability 1 - (1 - s^8)^16: 0.95 at 0.8, 0.9999 at 0.9.
    """
    from datasketch import MinHashLSH

    weights = (_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT)
    lsh = MinHashLSH(threshold=threshold, num_perm=permutations, weights=weights)
    return lsh.b, lsh.r


def band_keys(signatures: np.ndarray, band: int, rows: int) -> np.ndarray:
    """One key of 64 bits for each document, equal if the ``rows`` values of band number ``band`` are equal."""
    keys = np.full(len(signatures), band, dtype=np.uint64)
    for column in range(band * rows, (band + 1) * rows):
        keys ^= signatures[:, column]
        keys *= _PRIME
        keys ^= keys >> np.uint64(32)
    return keys


@lru_cache(maxsize=8)
def _empty(permutations: int) -> MinHash:
    from datasketch import MinHash

    return MinHash(num_perm=permutations, seed=SEED, scheme="affine32", hashfunc=_identity)


def _identity(value: int) -> int:
    return value


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
