"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, sections 3 and 4).

A row of N tokens with P pairs and a gap of g is

* P pairs ``key value key value ...`` from position 0. Keys are drawn without replacement, values too, from ids of their
  own.
* g filler tokens; Zoology has none.
* From position 2 P + g to the end each key once more, its *query*, at one of the even offsets 2 j from there. The j are
  drawn without replacement with probability in proportion to (j + 1)^(a - 1), a = 0.01, the first draw for the first
  pair, as in Zoology's generator: most queries come early, some anywhere.
* Filler everywhere else, uniform over ids of its own. Zoology draws it from the whole vocabulary; ids of its own leave
  no chance pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from eval.tasks.recall import MQARSettings
from eval.tasks.recall.questions import Cell, Ints, Questions, choices

POWER = 0.01


class Pairs(NamedTuple):
    """Rows of abstract ids: filler from 0, keys from ``filler``, values from ``filler + half``."""

    inputs: Ints
    """(B, N)."""
    queries: Ints
    """(B, P): where the key of each pair comes again."""


def slots(length: int, pairs: int, gap: int) -> int:
    """Places for queries."""
    return (length - 2 * pairs - gap) // 2


def draw(rng: np.random.Generator, count: int, *, length: int, pairs: int, gap: int, filler: int, half: int) -> Pairs:
    """``count`` rows as the module describes them; ``half``: keys, and values, to choose from."""
    keys = filler + choices(rng, count, half, pairs)
    values = filler + half + choices(rng, count, half, pairs)
    inputs = rng.integers(0, filler, (count, length))
    inputs[:, 0 : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    places = slots(length, pairs, gap)
    # The order of exponential arrival times with rates p is a draw without replacement with weights p (Efraimidis and
    # Spirakis 2006).
    rates = np.arange(1, places + 1) ** (POWER - 1)
    slot = np.argsort(rng.exponential(size=(count, places)) / rates, axis=1)[:, :pairs]
    queries = 2 * pairs + gap + 2 * slot
    np.put_along_axis(inputs, queries, keys, axis=1)
    return Pairs(inputs, queries)


class MQAR:
    """The task on a model's vocabulary: ``symbols`` (S,) token ids stand for the abstract ones, an eighth of them
    filler.

    A causal model answers at the query. A masked model finds a mask behind the query (in a place that is filler for the
    causal one) and answers there. The options are the values of the row.
    """

    axes = ("pairs", "length")

    def __init__(self, settings: MQARSettings, symbols: Ints, mask_id: int | None) -> None:
        assert settings.lengths is not None
        self.symbols, self.mask_id, self.gap = symbols, mask_id, settings.gap
        self.filler = len(symbols) // 8
        self.half = (len(symbols) - self.filler) // 2
        for pairs in settings.pairs:
            if self.half < 2 * pairs:
                raise UserError(
                    f"--symbols {len(symbols)} are too few for {pairs} pairs: --symbols {5 * pairs} or more, "
                    "or fewer --pairs"
                )
            for length in settings.lengths:
                if slots(length, pairs, self.gap) < pairs:
                    raise UserError(
                        f"rows of {length} tokens have no room for {pairs} queries behind {pairs} pairs and a gap of "
                        f"{self.gap}: --lengths {4 * pairs + self.gap} or more, fewer --pairs or a smaller --gap"
                    )
        self.cells: Sequence[Cell] = [
            Cell(f"{pairs} pairs, length {length}", length, {"pairs": pairs, "length": length})
            for pairs in settings.pairs
            for length in settings.lengths
        ]

    def rows(self, cell: Cell, rng: np.random.Generator, count: int, *, training: bool) -> Questions:
        """``count`` rows. Control ``without``: the pairs have other values, none of them an option."""
        pairs = cell.facts["pairs"]
        abstract, queries = draw(
            rng, count, length=cell.length, pairs=pairs, gap=self.gap, filler=self.filler, half=self.half
        )
        values = abstract[:, 1 : 2 * pairs : 2]
        pool = self.filler + self.half + np.arange(self.half)
        spare = np.stack([rng.permutation(np.setdiff1d(pool, row))[:pairs] for row in values])
        without = abstract.copy()
        without[:, 1 : 2 * pairs : 2] = spare
        inputs, without = self.symbols[abstract], self.symbols[without]
        at = queries
        if self.mask_id is not None:
            at = queries + 1
            for rows in (inputs, without):
                np.put_along_axis(rows, at, self.mask_id, axis=1)
        options = np.broadcast_to(self.symbols[values][:, None, :], (count, pairs, pairs)).copy()
        answer = np.broadcast_to(np.arange(pairs), (count, pairs)).copy()
        return Questions(inputs, at, options, answer, queries - 2 * np.arange(pairs), {"without": without})
