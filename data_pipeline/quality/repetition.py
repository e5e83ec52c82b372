"""How much of a document says again what it has said: lines, paragraphs, n-grams of words.

The measures of Rae et al. 2021 (Gopher, arXiv 2112.11446), appendix A.1.1, "Repetition removal". Where the paper leaves
room, a *repeat* is every occurrence after the first, no character counts twice, and shares are of the characters of
the words (lines, paragraphs) themselves, white space between them left out, so that every share lies in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Repeats(NamedTuple):
    """The share of items, and of their characters, in repeats of earlier items."""

    items: float
    chars: float


def repeats(items: Sequence[str]) -> Repeats:
    """Of ``items`` (lines or paragraphs) those that equal an earlier one."""
    seen: set[str] = set()
    count = chars = 0
    for item in items:
        if item in seen:
            count += 1
            chars += len(item)
        else:
            seen.add(item)
    return Repeats(count / max(1, len(items)), chars / max(1, sum(map(len, items))))


class WordGrams:
    """The n-grams of words that come more than once in a document, for any n.

    An n-gram can come twice only if both its (n-1)-grams do, so each n looks only at what is left of n - 1: for common
    text nearly nothing from n = 4 on. Comparisons are exact, nothing is hashed.
    """

    def __init__(self, words: Sequence[str]) -> None:
        index: dict[str, int] = {}
        ids = np.fromiter((index.setdefault(word, len(index)) for word in words), np.int64, len(words))
        self._lengths = np.fromiter(map(len, words), np.int64, len(words))
        self._chars = max(1, int(self._lengths.sum()))
        positions = np.flatnonzero(np.bincount(ids)[ids] > 1) if words else ids
        # _levels[n - 1]: ascending starts of the n-grams that come more than once, and a number for each distinct one
        self._levels: list[tuple[np.ndarray, np.ndarray]] = [(positions, ids[positions])]

    def top(self, n: int) -> float:
        """The share of characters in the most frequent n-gram, 0 if none comes twice.

        Of several equally frequent ones, the one with the most characters.
        """
        positions, groups = self._level(n)
        if not positions.size:
            return 0.0
        _, first, inverse, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
        ends = np.concatenate([[0], np.cumsum(self._lengths)])
        chars = ends[positions[first] + n] - ends[positions[first]]
        best = np.lexsort((-chars, -counts))[0]
        return self._covered(positions[inverse == best], n)

    def repeated(self, n: int) -> float:
        """The share of characters in n-grams that came before in the document."""
        positions, groups = self._level(n)
        again = np.ones(positions.size, dtype=bool)
        again[np.unique(groups, return_index=True)[1]] = False
        return self._covered(positions[again], n)

    def _level(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        while len(self._levels) < n:
            positions, groups = self._levels[-1]
            pairs = np.flatnonzero(np.diff(positions) == 1)
            if not pairs.size:
                self._levels.append((positions[:0], groups[:0]))
                continue
            keys = groups[pairs] * (groups.max() + 1) + groups[pairs + 1]
            _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
            keep = counts[inverse] > 1
            self._levels.append((positions[pairs[keep]], inverse[keep]))
        return self._levels[n - 1]

    def _covered(self, positions: np.ndarray, n: int) -> float:
        """The share of characters in words of the n-grams that start at ``positions`` (distinct)."""
        steps = np.zeros(self._lengths.size + 1, dtype=np.int64)
        steps[positions] += 1
        steps[positions + n] -= 1
        inside = np.cumsum(steps[:-1]) > 0
        return float(self._lengths[inside].sum()) / self._chars
