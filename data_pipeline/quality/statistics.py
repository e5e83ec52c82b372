"""One document and the statistics that filters ask of it, each computed when first asked for and once."""

from __future__ import annotations

import re
from functools import cached_property

import numpy as np

from data_pipeline.quality import script
from data_pipeline.quality.repetition import Repeats, WordGrams, repeats

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
        return script.classes(self.text)

    @cached_property
    def _word_starts(self) -> np.ndarray:
        space = (self._classes & script.SPACE).view(bool)
        starts = ~space
        starts[1:] &= space[:-1]
        return np.flatnonzero(starts)

    @property
    def num_words(self) -> int:
        return int(self._word_starts.size)

    @property
    def mean_word_length(self) -> float:
        """Characters a word; 0 without words."""
        inked = self._classes.size - np.count_nonzero(self._classes & script.SPACE)
        return float(inked) / max(1, self.num_words)

    @property
    def alphabetic_words(self) -> float:
        """The share of words with at least one letter; 0 without words."""
        if not self.num_words:
            return 0.0
        with_letter = np.maximum.reduceat(self._classes & script.LETTER, self._word_starts)
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
        letters = np.count_nonzero(self._classes & script.LETTER)
        inside = np.count_nonzero(script.script_table(scripts)[script.code_points(self.text)])
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
