"""Induction: a passage that occurred before comes again (Olsson et al. 2022, "In-context learning and induction heads",
arXiv 2209.11895: repeated random tokens; here also real text, and by distance).

All rows of a model are equally long, and the second occurrence is always their end, so that the scored tokens stand
at the same positions whatever the distance. The first occurrence is written over what was there ``distance`` tokens
before. In the control another passage is written there, so that the text is broken in the same places.

Random rows: the passage is made of different tokens that occur nowhere else in the row. A token's only cue is the one
before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import UserError
from eval.tasks.recall import InductionSettings
from eval.tasks.recall.questions import Cell, Ints, Questions
from eval.tasks.recall.vocabulary import Text

SPARE = 16
"""Random rows have at least so many different tokens outside of the passages."""


class Induction:
    """The task; ``source``: token ids (S,) to draw random rows from, or text."""

    axes = None

    def __init__(self, settings: InductionSettings, source: Ints | Text, mask_id: int | None) -> None:
        assert settings.distances is not None
        self.source, self.mask_id, self.passage = source, mask_id, settings.passage
        if isinstance(source, np.ndarray) and len(source) < 2 * self.passage + SPARE:
            raise UserError(
                f"--symbols {len(source)} are too few for a passage of {self.passage} different tokens: "
                f"--symbols {2 * self.passage + SPARE} or more, or a shorter --passage"
            )
        self.length = max(settings.distances) + self.passage
        self.hidden = max(1, round(settings.mask_rate * self.passage))
        self.cells: Sequence[Cell] = [
            Cell(f"distance {distance}", self.length, {"length": self.length}) for distance in settings.distances
        ]
        self.distances = dict(zip((cell.name for cell in self.cells), settings.distances, strict=True))

    def rows(self, cell: Cell, rng: np.random.Generator, count: int, *, training: bool) -> Questions:
        """``count`` rows. A causal model is asked for every token of the passage but the first, which nothing tells;
        a masked one for a share of them."""
        size, distance = self.passage, self.distances[cell.name]
        if isinstance(self.source, Text):
            inputs = self.source.windows(rng, count, self.length, training=training)
            other = self.source.windows(rng, count, size, training=training)
        else:
            order = rng.permuted(np.tile(self.source, (count, 1)), axis=1)
            inputs = np.take_along_axis(order, rng.integers(2 * size, order.shape[1], (count, self.length)), axis=1)
            inputs[:, -size:], other = order[:, :size], order[:, size : 2 * size]
        passage, first = inputs[:, -size:].copy(), self.length - size - distance
        without = inputs.copy()
        inputs[:, first : first + size] = passage
        without[:, first : first + size] = other
        if self.mask_id is None:
            within = np.broadcast_to(np.arange(1, size), (count, size - 1))
            at = self.length - size + within - 1
        else:
            within = np.sort(rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)[:, : self.hidden], axis=1)
            at = self.length - size + within
            for rows in (inputs, without):
                np.put_along_axis(rows, at, self.mask_id, axis=1)
        if isinstance(self.source, Text):
            options, answer = np.take_along_axis(passage, within, axis=1)[..., None], np.zeros_like(within)
        else:
            options, answer = np.broadcast_to(passage[:, None, :], (count, within.shape[1], size)).copy(), within
        return Questions(inputs, at, options, answer, np.full_like(within, distance), {"without": without})
