"""Statistics of one document that filters use, each computed when first asked for and once.

Repetition is measured as in Rae et al. 2021 (Gopher, arXiv 2112.11446), appendix A.1.1, "Repetition removal". Where the
paper leaves it open, a *repeat* is every occurrence after the first, and no character counts twice. Shares are of the
characters of the words (lines, paragraphs) themselves, without the white space between them: each lies in [0, 1].

Scripts come from Python's own Unicode database: ``latin`` are the letters whose name begins with LATIN, fullwidth ones
included. Combining vowel signs (Devanagari, Thai) are marks and no letters, and are not counted. A newer Python with a
newer Unicode knows more letters.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

SPACE, LETTER = 1, 2  # bits of :func:`character_classes`

# The first words of the letters' names, by script. Names of the form "FULLWIDTH LATIN ..." and "HALFWIDTH KATAKANA ..."
# are read without their first word.
_PREFIXES: dict[str, tuple[str, ...]] = {
    "han": ("CJK UNIFIED", "CJK COMPATIBILITY", "IDEOGRAPHIC ITERATION"),
    "hangul": ("HANGUL",),
    "hiragana": ("HIRAGANA", "HENTAIGANA"),
    "katakana": ("KATAKANA",),
}
_SINGLE_WORD = (
    "arabic armenian bengali cyrillic devanagari ethiopic georgian greek gujarati gurmukhi hebrew kannada khmer lao "
    "latin malayalam mongolian myanmar oriya sinhala tamil telugu thai tibetan"
)
_PREFIXES.update({name: (name.upper(),) for name in _SINGLE_WORD.split()})
_PREFIXES["latin"] += ("FEMININE ORDINAL", "MASCULINE ORDINAL")

SCRIPTS: tuple[str, ...] = tuple(sorted(_PREFIXES))

# The ends of a sentence (C4: full stop, exclamation and question mark, end quotation mark), of other scripts too.
TERMINAL_MARKS = (".", "!", "?", '"', "”", "。", "！", "？", "؟", "।")
ELLIPSES = ("...", "…")
BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*")
STOP_WORDS = ("the", "of", "and", "to", "that", "with", "be", "have")  # Gopher's eight, the most frequent first
POLICY_PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")

_STOP_WORD_PATTERNS = tuple(re.compile(rf"\b{word}\b") for word in STOP_WORDS)
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|$)""")
_C4_LINE_WORDS = 5


class Statistics:
    """Of one document: words are runs without white space, lines are stripped and blank ones left out."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lower(self) -> str:
        return self.text.lower()

    @cached_property
    def _classes(self) -> np.ndarray:
        return character_classes(self.text)

    @cached_property
    def _word_starts(self) -> np.ndarray:
        space = (self._classes & SPACE).view(bool)
        starts = ~space
        starts[1:] &= space[:-1]
        return np.flatnonzero(starts)

    @property
    def num_words(self) -> int:
        return int(self._word_starts.size)

    @property
    def mean_word_length(self) -> float:
        """Characters a word; 0 without words."""
        inked = self._classes.size - np.count_nonzero(self._classes & SPACE)
        return float(inked) / max(1, self.num_words)

    @property
    def alphabetic_words(self) -> float:
        """The share of words with at least one letter; 0 without words."""
        if not self.num_words:
            return 0.0
        with_letter = np.maximum.reduceat(self._classes & LETTER, self._word_starts)
        return int(np.count_nonzero(with_letter)) / self.num_words

    @property
    def symbols(self) -> float:
        """Hash signs a word or ellipses a word, whichever are more."""
        hashes = self.text.count("#")
        ellipses = sum(map(self.text.count, ELLIPSES))
        return max(hashes, ellipses) / max(1, self.num_words)

    def has_stop_words(self, least: int) -> bool:
        """Whether at least ``least`` different ones of Gopher's eight stop words occur, in either case."""
        found = 0
        for pattern in _STOP_WORD_PATTERNS:
            if found >= least:
                break
            found += pattern.search(self.lower) is not None
        return found >= least

    def script_share(self, scripts: tuple[str, ...]) -> float:
        """The share of letters that belong to ``scripts``; 0 without letters."""
        letters = np.count_nonzero(self._classes & LETTER)
        inside = np.count_nonzero(script_table(scripts)[code_points(self.text)])
        return int(inside) / max(1, int(letters))

    @cached_property
    def lines(self) -> list[str]:
        return [stripped for line in self.text.splitlines() if (stripped := line.strip())]

    @property
    def bullet_lines(self) -> float:
        return self._share_of_lines(sum(line.startswith(BULLETS) for line in self.lines))

    @property
    def ellipsis_lines(self) -> float:
        return self._share_of_lines(sum(line.endswith(ELLIPSES) for line in self.lines))

    @property
    def terminal_lines(self) -> float:
        return self._share_of_lines(sum(line.endswith(TERMINAL_MARKS) for line in self.lines))

    def short_lines(self, chars: int) -> float:
        """The share of lines with fewer than ``chars`` characters."""
        return self._share_of_lines(sum(len(line) < chars for line in self.lines))

    def _share_of_lines(self, count: int) -> float:
        return count / max(1, len(self.lines))

    @cached_property
    def repeated_lines(self) -> Repeats:
        return repeats(self.lines)

    @cached_property
    def repeated_paragraphs(self) -> Repeats:
        return repeats([stripped for part in _PARAGRAPH_BREAK.split(self.text) if (stripped := part.strip())])

    @cached_property
    def grams(self) -> WordGrams:
        return WordGrams(self.text.split())

    @cached_property
    def c4_sentences(self) -> int:
        """Sentences on the lines that C4 keeps (Raffel et al. 2020, section 2.2).

        Such a line ends in a terminal mark and no ellipsis, has at least five words, and does not speak of Javascript
        or of a policy. Sentence ends are found by their marks; C4 used NLTK's punkt model.
        """
        count = 0
        for line in self.lines:
            if "[" in line:
                line = _CITATION.sub("", line).rstrip()
            if not line.endswith(TERMINAL_MARKS) or line.endswith(ELLIPSES) or len(line.split()) < _C4_LINE_WORDS:
                continue
            lower = line.lower()
            if "javascript" not in lower and not any(phrase in lower for phrase in POLICY_PHRASES):
                count += max(1, len(_SENTENCE_END.findall(line)))
        return count


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


def code_points(text: str) -> np.ndarray:
    """The code points of ``text``, uint32, one for each character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def character_classes(text: str) -> np.ndarray:
    """For each character of ``text`` the bits SPACE (``str.isspace``) and LETTER (``str.isalpha``), uint8."""
    table = _class_table()
    if text.isascii():  # bytes.translate runs at memory speed, a gather does not
        return np.frombuffer(text.encode("ascii").translate(table[:256].tobytes()), dtype=np.uint8)
    return table[code_points(text)]


def script_table(scripts: tuple[str, ...]) -> np.ndarray:
    """Of each code point, whether it is a letter of one of ``scripts`` (names in :data:`SCRIPTS`), bool."""
    prefixes = tuple(prefix for script in scripts for prefix in _PREFIXES[script])
    return _prefix_table(prefixes)


@lru_cache(maxsize=1)
def _class_table() -> np.ndarray:
    characters = np.arange(sys.maxunicode + 1, dtype=np.uint32).view("U1")
    space = np.strings.isspace(characters).astype(np.uint8) * SPACE
    letter = np.strings.isalpha(characters).astype(np.uint8) * LETTER
    return np.asarray(space + letter, dtype=np.uint8)


@lru_cache(maxsize=16)
def _prefix_table(prefixes: tuple[str, ...]) -> np.ndarray:
    # 137,000 names are looked up once for a set of scripts, 0.05 s
    table = np.zeros(sys.maxunicode + 1, dtype=bool)
    for code in np.flatnonzero(_class_table() & LETTER).tolist():
        name = unicodedata.name(chr(code), "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
        table[code] = name.startswith(prefixes)
    return table
