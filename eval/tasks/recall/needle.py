"""A key in a haystack, by depth and length.

Passkey retrieval is this with a number in the published filler (Mohtashami and Jaggi 2023, "Landmark attention", arXiv
2305.16300, section 4.2); there the needle says the number twice, here once.

The needle takes the place of as many tokens of the haystack, at ``depth`` percent of the places before the question.
The same haystack without it is the control ``without``, and with another key in it the control ``other``. Each token of
the key is asked for with those before it given (causal), or all of them at once (masked), against the other options of
its place. These are the ten digits, or words that the haystack does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle, islice

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.tasks.recall import KEY, NeedleSettings
from eval.tasks.recall.questions import Cell, Ints, Questions
from eval.tasks.recall.vocabulary import Text, digit_tokens, ordinary, words

FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
"""Mohtashami and Jaggi 2023, section 4.2."""


class Needle:
    """The task; ``text``: the haystack, for settings that want held-out text."""

    axes = ("depth", "length")

    def __init__(self, settings: NeedleSettings, tokenizer: Tokenizer, text: Text | None, mask_id: int | None) -> None:
        assert settings.lengths is not None
        self.settings, self.text, self.mask_id = settings, text, mask_id
        self.ordinary = ordinary(tokenizer)
        self.sentences = [tokenizer.encode(sentence) for sentence in FILLER]
        self.digits = digit_tokens(tokenizer) if settings.key == "digits" else None
        self.words = words(tokenizer)
        if self.digits is None and len(self.words) < settings.choices:
            raise UserError(
                f"--choices {settings.choices}: the tokenizer has {len(self.words)} words of one token; fewer, or "
                "--key digits"
            )
        # A word's token brings its own space.
        before, after = (
            [
                np.array(tokenizer.encode(part if self.digits is not None or place else part.rstrip()), dtype=np.int64)
                for place, part in enumerate(sentence.split(KEY))
            ]
            for sentence in (settings.sentence, settings.question)
        )
        self.sentence, self.question = (before[0], before[1]), (after[0], after[1])
        self.size = settings.digits if self.digits is not None else 1
        self.needle = len(self.sentence[0]) + self.size + len(self.sentence[1])
        # A causal model reads the key but for its last token; a masked one what follows it, too.
        tail = self.size - 1 if mask_id is None else self.size + len(self.question[1])
        self.end = len(self.question[0]) + tail
        for length in settings.lengths:
            if length < self.needle + self.end + 1:
                raise UserError(
                    f"rows of {length} tokens have no room for the needle and the question: --lengths "
                    f"{self.needle + self.end + 1} or more"
                )
        self.cells: Sequence[Cell] = [
            Cell(f"length {length}, depth {depth}%", length, {"depth": depth, "length": length})
            for length in settings.lengths
            for depth in settings.depths
        ]

    def rows(self, cell: Cell, rng: np.random.Generator, count: int, *, training: bool) -> Questions:
        """``count`` rows of a depth and length."""
        before = cell.length - self.end
        hay = self._haystack(rng, count, before, training=training)
        key, other, options, answer = self._keys(rng, hay)
        start = round((before - self.needle) * cell.facts["depth"] / 100)
        asked = before + len(self.question[0])
        within = np.arange(self.size)
        ending = np.concatenate([np.broadcast_to(self.question[0], (count, len(self.question[0]))), key], axis=1)
        if self.mask_id is None:
            ending = ending[:, :-1]
        else:
            ending[:, len(self.question[0]) :] = self.mask_id
            ending = np.concatenate([ending, np.broadcast_to(self.question[1], (count, len(self.question[1])))], axis=1)
        without = np.concatenate([hay, ending], axis=1)
        place = start + len(self.sentence[0])
        rows = []
        for planted in (key, other):
            row = without.copy()
            row[:, start:place] = self.sentence[0]
            row[:, place : place + self.size] = planted
            row[:, place + self.size : start + self.needle] = self.sentence[1]
            rows.append(row)
        at = np.broadcast_to(asked + within - (self.mask_id is None), (count, self.size)).copy()
        distance = np.full((count, self.size), asked - place, dtype=np.int64)
        return Questions(rows[0], at, options, answer, distance, {"without": without, "other": rows[1]})

    def _haystack(self, rng: np.random.Generator, count: int, length: int, *, training: bool) -> Ints:
        if self.settings.haystack == "text":
            assert self.text is not None
            return self.text.windows(rng, count, length, training=training)
        if self.settings.haystack == "noise":
            return rng.choice(self.ordinary, (count, length))
        first = rng.integers(0, len(self.sentences), count)
        return np.array(
            [list(islice(chain.from_iterable(islice(cycle(self.sentences), int(f), None)), length)) for f in first],
            dtype=np.int64,
        )

    def _keys(self, rng: np.random.Generator, hay: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Keys and other keys (B, size), options (B, size, K) and the right ones' places in them (B, size). Noise in
        ``hay`` that is one of the options is drawn anew."""
        count = len(hay)
        if self.digits is not None:
            right = rng.integers(0, 10, (count, self.size))
            wrong = (right + rng.integers(1, 10, right.shape)) % 10
            options = np.broadcast_to(self.digits, (count, self.size, 10)).copy()
            return self.digits[right], self.digits[wrong], options, right
        said = np.concatenate([*self.sentence, *self.question])
        chosen = np.empty((count, self.settings.choices), dtype=np.int64)
        for row in range(count):
            noise = self.settings.haystack == "noise"
            free = np.setdiff1d(self.words, said if noise else np.concatenate([hay[row], said]))
            if len(free) < self.settings.choices:
                raise UserError(
                    f"a haystack of {hay.shape[1]} tokens leaves {len(free)} words of one token that are not in it, "
                    f"--choices {self.settings.choices} asks for more: fewer, or --key digits"
                )
            chosen[row] = rng.permutation(free)[: self.settings.choices]
            if noise:
                taken = np.isin(hay[row], chosen[row])
                hay[row, taken] = rng.choice(np.setdiff1d(self.ordinary, chosen[row]), taken.sum())
        answer = rng.integers(0, self.settings.choices, (count, 1))
        wrong = (answer + rng.integers(1, self.settings.choices, answer.shape)) % self.settings.choices
        key, other = (np.take_along_axis(chosen, place, axis=1) for place in (answer, wrong))
        return key, other, chosen[:, None, :], answer
