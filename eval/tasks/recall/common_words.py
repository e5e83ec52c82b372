"""The word that came most often (after the common words and frequent words of RULER, Hsieh et al. 2024, arXiv
2404.06654, section 3; there the ten or three commonest words are listed, here the commonest is told from others).

A row of N tokens ends with a *cue*, a token of its own. Before it stand, in random order,

* K words, the options: one of them r m times, each other m times; m is the largest number with which they fill at most
  half of the row.
* Other tokens, none an option, all equally often but for one time, and never more than m times.

Nothing here is far back: the whole row is the evidence. A window sees a sample of it, so it is above chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import UserError
from eval.tasks.recall import CommonWordsSettings
from eval.tasks.recall.questions import Cell, Ints, Questions


class CommonWords:
    """The task on a model's vocabulary: ``symbols`` (S,) are the cue, the words and the other tokens.

    A causal model answers at the cue, the row's last token. A masked model finds a mask behind the cue.
    """

    axes = ("ratio", "length")

    def __init__(self, settings: CommonWordsSettings, symbols: Ints, mask_id: int | None) -> None:
        assert settings.lengths is not None
        self.symbols, self.mask_id, self.choices = symbols, mask_id, settings.choices
        self.others = len(symbols) - 1 - 2 * self.choices
        # The rest of a row is less than (K - 1 + r) (m + 2) tokens: no other token then comes more than m times.
        least = 3 * (self.choices - 1 + max(settings.ratios))
        if self.others < least:
            raise UserError(
                f"--symbols {len(symbols)} are too few for {self.choices} words, one of them {max(settings.ratios)} "
                f"times as often: --symbols {1 + 2 * self.choices + least} or more, or fewer --choices"
            )
        self.cells: Sequence[Cell] = [
            Cell(f"ratio {ratio}, length {length}", length, {"ratio": ratio, "length": length})
            for ratio in settings.ratios
            for length in settings.lengths
            if self._times(length, ratio)
        ]
        if not self.cells:
            least = 2 * (self.choices - 1 + min(settings.ratios)) + self.end
            raise UserError(
                f"rows of {max(settings.lengths)} tokens have no room for {self.choices} words, one of them "
                f"{min(settings.ratios)} times as often: --lengths {least} or more, fewer --choices"
            )

    @property
    def end(self) -> int:
        """Tokens of the cue, and of a masked answer."""
        return 1 if self.mask_id is None else 2

    def _times(self, length: int, ratio: int) -> int:
        """m of the module's description; 0: no room."""
        return (length - self.end) // (2 * (self.choices - 1 + ratio))

    def rows(self, cell: Cell, rng: np.random.Generator, count: int, *, training: bool) -> Questions:
        """``count`` rows of a ratio and length.

        Controls: ``without`` has another word in place of each option; in ``other`` the commonest word and another
        option stand in each other's places. The distance is to the first place of the commonest word.
        """
        size, ratio = self.choices, cell.facts["ratio"]
        times, body = self._times(cell.length, ratio), cell.length - self.end
        ids = rng.permuted(np.tile(self.symbols[1:], (count, 1)), axis=1)
        words, spare, others = ids[:, :size], ids[:, size : 2 * size], ids[:, 2 * size :]
        # Which word or other token stands where: the first word is the commonest.
        common = np.repeat(np.arange(size), [ratio * times] + [times] * (size - 1))
        rest = size + np.arange(body - len(common)) % self.others
        which = rng.permuted(np.tile(np.concatenate([common, rest]), (count, 1)), axis=1)
        swapped = words.copy()
        swapped[:, :2] = words[:, 1::-1]
        ending = [self.symbols[0]] + ([] if self.mask_id is None else [self.mask_id])
        tail = np.broadcast_to(np.array(ending, dtype=np.int64), (count, self.end))
        inputs, without, other = (
            np.concatenate([np.take_along_axis(np.concatenate([some, others], axis=1), which, axis=1), tail], axis=1)
            for some in (words, spare, swapped)
        )
        order = rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)
        options = np.take_along_axis(words, order, axis=1)[:, None, :]
        answer = np.argmax(order == 0, axis=1)[:, None]
        place = body + 1
        first = np.argmax(which == 0, axis=1)[:, None]
        at = np.full((count, 1), place - (self.mask_id is None), dtype=np.int64)
        return Questions(inputs, at, options, answer, place - first, {"without": without, "other": other})
