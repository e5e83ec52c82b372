"""What can be counted in texts alone. Texts are sequences of token ids unless said otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

ZIPF_FIRST = 10
ZIPF_LEAST = 20


def ngrams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens, in order."""
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def cut_to(texts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The first ``tokens`` tokens of the texts laid end to end: measures of a whole set depend on its size."""
    out: list[list[int]] = []
    for text in texts:
        out.append(list(text[:tokens]))
        tokens -= len(out[-1])
    return out


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams as a share of all n-grams, over all texts (distinct-n, Li et al. 2016); NaN without any.

    Falls with the number of tokens: compare sets of the same size only.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repeated(text: Sequence[int], n: int = 4) -> tuple[int, int]:
    """n-grams of a text that stood in it before, and all its n-grams: seq-rep-n of Welleck et al. 2020 is their
    quotient."""
    grams = ngrams(text, n)
    return len(grams) - len(set(grams)), len(grams)


def repeated_in_window(text: Sequence[int], window: int) -> tuple[int, int]:
    """Tokens that occur among the ``window`` before them, and all tokens after the first: rep/l of Welleck et al. 2020,
    with what was written in the place of what is predicted."""
    hits = sum(text[i] in text[max(0, i - window) : i] for i in range(1, len(text)))
    return hits, max(len(text) - 1, 0)


def longest_repeat(text: Sequence[int]) -> int:
    """Length of the longest run of tokens that stands in the text twice; the two may overlap."""
    low, high = 0, max(len(text) - 1, 0)
    while low < high:  # a run that stands twice has shorter ones that do
        middle = (low + high + 1) // 2
        low, high = (middle, high) if repeated(text, middle)[0] else (low, middle - 1)
    return low


def copied(prompt: Sequence[int], text: Sequence[int], n: int = 4) -> tuple[int, int]:
    """n-grams of the text that stand in the prompt, and all its n-grams."""
    known = set(ngrams(prompt, n))
    grams = ngrams(text, n)
    return sum(gram in known for gram in grams), len(grams)


def rank_frequencies(texts: Sequence[Sequence[int]]) -> np.ndarray:
    """How often each token occurs, the most frequent first: (types,) int64."""
    return np.array(sorted(Counter(t for text in texts for t in text).values(), reverse=True), dtype=np.int64)


def zipf_exponent(frequencies: np.ndarray) -> float:
    """-slope of log frequency over log rank, least squares over the ranks from 10 on (Holtzman et al. 2020 fit all).

    The first ranks are function words that follow no power law and would weigh most. NaN with fewer than 20 ranks to
    fit. The many tokens that occur once flatten the slope of small sets: compare sets of the same size only.
    """
    from scipy.stats import linregress

    ranks = np.arange(ZIPF_FIRST, len(frequencies) + 1)
    if len(ranks) < ZIPF_LEAST:
        return float("nan")
    return -float(linregress(np.log(ranks), np.log(frequencies[ZIPF_FIRST - 1 :])).slope)


def self_bleu(texts: Sequence[str]) -> float:
    """Mean sentence BLEU-4 of each text with all others as its references, 0 to 1 (Zhu et al. 2018), by sacrebleu.

    Words by sacrebleu's "13a" rules, effective order for texts of fewer than four words. Rises with the number of
    texts: compare sets of the same number only. NaN for fewer than two texts.
    """
    from sacrebleu.metrics import BLEU

    if len(texts) < 2:
        return float("nan")
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return float(np.mean(scores)) / 100
