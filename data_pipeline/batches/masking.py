"""Dynamic masking for masked language modeling (Devlin et al. 2019, section 3.1; dynamic as in Liu et al. 2019,
section 4.1) of tokens, whole words, or spans of words (Joshi et al. 2020, section 3.1).

The noise of a row is a pure function of (seed, sample id) and the row's tokens. It does not depend on the batch a row
is in, its place there, the number of processes or earlier batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from data_pipeline.batches import IGNORE
from data_pipeline.batches.counter_rng import as_uint32, random_at, random_rows, row_keys, threshold32
from data_pipeline.batches.spans import choose_spans
from data_pipeline.batches.words import WordBoundaries
from data_pipeline.errors import UserError

Unit = Literal["token", "word", "span"]

# Counters of a row's noise: positions stay far below 2^32, so what is drawn for different ends never meets.
_CHOICE, _REPLACEMENT, _SPANS = 0, 1 << 32, 1 << 33


@dataclass(frozen=True)
class Masking:
    """What is hidden from the model, and how.

    ``rate`` is the expected share of ordinary tokens (not special ones) that become targets. Of the targets a share
    ``mask_share`` is replaced by the mask token and ``random_share`` by ordinary tokens drawn uniformly, the rest is
    left. ``unit`` says what becomes a target as a whole:

    * ``token``: each token by itself.
    * ``word``: each word by itself, with probability ``rate``: the whole-word masking of the second release of BERT.
      How a target is hidden is drawn for each token, as there.
    * ``span``: runs of whole words, of geometric length with parameter ``span_p`` up to ``span_max`` words (mean 3.8 as
      set here). How it is hidden is drawn once for all tokens of a span, random replacements for each token.

    Raises :class:`UserError` for a value out of its range.
    """

    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    unit: Unit = "token"
    span_p: float = 0.2
    span_max: int = 10

    def __post_init__(self) -> None:
        if not 0.0 < self.rate < 1.0:
            raise UserError(f"masking rate must lie between 0 and 1, got {self.rate}")
        shares = self.mask_share + self.random_share
        # Written so that NaN is refused too; shares that sum to 1 on paper may be off by a rounding.
        if not (self.mask_share >= 0.0 and self.random_share >= 0.0 and shares <= 1.0 + 1e-12):
            raise UserError(
                f"mask_share {self.mask_share} and random_share {self.random_share} must not be negative nor sum to "
                "more than 1"
            )
        if self.unit not in get_args(Unit):
            raise UserError(f"masking unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        if not 0.0 < self.span_p <= 1.0:
            raise UserError(f"span_p must lie above 0 and not above 1, got {self.span_p}")
        if not (isinstance(self.span_max, int) and 1 <= self.span_max <= 255):
            raise UserError(f"span_max must be a number of words from 1 to 255, got {self.span_max}")


def mask_tokens(
    input_ids: np.ndarray,
    sample_ids: np.ndarray,
    *,
    seed: int,
    masking: Masking,
    boundaries: WordBoundaries | None,
    mask_id: int,
    special_ids: Sequence[int],
    vocab_size: int,
    documents: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose targets among the ordinary tokens of each row and hide them.

    ``input_ids`` (B, L) int64, ``sample_ids`` (B,) int64 >= 0. ``boundaries`` is needed for words and spans.
    ``documents`` (B, L) integers tell the documents of packed rows apart. Special tokens, padding among them, are never
    targets and never drawn; no word and no span goes from one document into another.

    Returns (inputs (B, L) int64, labels (B, L) int64: the original token at targets, -100 elsewhere). ``input_ids`` is
    not changed. Tokens and words: what happens at a position follows from the row up to there. The beginning of a row
    with the same sample id thus gets the beginning of its noise. A word is decided at its first token, and a word that
    the row's end cuts counts as one. Spans: it follows from the whole row, whose length sets how much is masked.

    Raises :class:`UserError` for words or spans without ``boundaries``.
    """
    if masking.unit != "token" and boundaries is None:
        raise UserError(
            f"masking unit {masking.unit!r} needs the boundaries of words, which come from the tokenizer: give it "
            "or use unit 'token'"
        )
    ordinary, candidates = _vocabulary(vocab_size, tuple(special_ids))
    keys = row_keys(seed, sample_ids)
    inputs = np.array(input_ids, dtype=np.int64, order="C")
    labels = np.full(inputs.shape, IGNORE, dtype=np.int64)
    targets, deciding = _choose(inputs, keys, masking, boundaries, ordinary, documents)
    _hide(inputs, labels, keys, targets, deciding, masking, mask_id, candidates)
    return inputs, labels


def _choose(
    ids: np.ndarray,
    keys: np.ndarray,
    masking: Masking,
    boundaries: WordBoundaries | None,
    ordinary: np.ndarray,
    documents: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions of the targets, and of the tokens whose noise says how each is hidden."""
    length = ids.shape[1]
    starts = None if boundaries is None or masking.unit == "token" else boundaries.starts(ids)
    edges = None
    if starts is not None and documents is not None:
        # A packed document that was cut ends without a special token: its last word must not go on in the next.
        edges = np.zeros(ids.shape, dtype=bool)
        np.not_equal(documents[:, 1:], documents[:, :-1], out=edges[:, 1:])
        starts = starts | edges
    if starts is not None and masking.unit == "span":
        words = random_rows(keys, length + 1, _SPANS)
        return choose_spans(
            starts, ordinary[ids], words, edges, rate=masking.rate, span_p=masking.span_p, span_max=masking.span_max
        )
    chosen = as_uint32(random_rows(keys, (length + 1) // 2, _CHOICE))[:, :length] < threshold32(masking.rate)
    targets = np.flatnonzero(chosen) if starts is None else _whole_words(starts, chosen)
    targets = targets[ordinary[ids.reshape(-1)[targets]]]
    return targets, targets


def _hide(
    inputs: np.ndarray,
    labels: np.ndarray,
    keys: np.ndarray,
    targets: np.ndarray,
    deciding: np.ndarray,
    masking: Masking,
    mask_id: int,
    candidates: np.ndarray,
) -> None:
    """Replace the targets in ``inputs`` and write what they were to ``labels``, both (B, L) and contiguous."""
    length = inputs.shape[1]
    # The upper half of a position's word says how it is hidden, the lower one which token is drawn.
    words = random_at(keys, targets, length, _REPLACEMENT)
    how = (words if deciding is targets else random_at(keys, deciding, length, _REPLACEMENT)) >> np.uint64(32)
    masked = how < np.uint64(round(masking.mask_share * 2.0**32))
    redrawn = how < np.uint64(round((masking.mask_share + masking.random_share) * 2.0**32))
    drawn = candidates[((words & np.uint64(0xFFFFFFFF)) * np.uint64(len(candidates))) >> np.uint64(32)]
    flat = inputs.reshape(-1)
    originals = flat[targets]
    flat[targets] = np.where(masked, mask_id, np.where(redrawn, drawn, originals))
    labels.reshape(-1)[targets] = originals


def _whole_words(starts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Flat positions of all tokens of the words whose first token is chosen; both (B, L) bool."""
    begins = np.flatnonzero(starts)
    picked = np.flatnonzero(chosen.reshape(-1)[begins])
    first = begins[picked]
    sizes = np.append(begins, starts.size)[picked + 1] - first
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + sizes, sizes)


@lru_cache(maxsize=8)
def _vocabulary(vocab_size: int, special_ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(which ids are ordinary (V,) bool, the ordinary ids); made once, since it takes 33 us at 50,000 tokens."""
    ordinary = np.ones(vocab_size, dtype=bool)
    ordinary[list(special_ids)] = False
    candidates = np.flatnonzero(ordinary)
    ordinary.setflags(write=False)
    candidates.setflags(write=False)
    return ordinary, candidates
