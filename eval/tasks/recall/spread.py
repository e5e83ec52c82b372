"""Associative recall with the pairs spread over the row, and several values of a key.

Differs from the rows of :mod:`eval.tasks.recall.mqar` in three ways:

* The pairs stand anywhere in the first part of the row, at even places drawn without replacement, in any order. A
  landmark of some form of attention then holds none, one or several of them.
* The queries stand anywhere in the rest, each place as likely, so that all distances occur.
* With V > 1 a key has V values, each of a *kind* with ids of its own, in V pairs in V places. A query is the key and
  a *mark* that names the kind. Matching the key is then not enough, as V places have it (after the keys with several
  values of RULER, Hsieh et al. 2024, arXiv 2404.06654, section 3; there all values are listed, here each is asked for).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from eval.tasks.recall import MQARSettings
from eval.tasks.recall.questions import Cell, Ints, Questions, choices


class Layout(NamedTuple):
    """Where things are. ``pairs`` keys with ``values`` values each in the first ``spread`` of ``length`` tokens."""

    length: int
    pairs: int
    values: int
    spread: float
    gap: int

    @property
    def span(self) -> int:
        """Tokens of the first part, even."""
        return 2 * int(self.spread * self.length / 2)

    @property
    def step(self) -> int:
        """Tokens of a query: the key, the mark where there are several kinds, and the place of a masked answer."""
        return 2 if self.values == 1 else 3

    @property
    def slots(self) -> int:
        """Places for queries."""
        return (self.length - self.span - self.gap) // self.step

    @property
    def fits(self) -> bool:
        """Whether the pairs and their queries have room."""
        count = self.pairs * self.values
        return self.span // 2 >= count and self.slots >= count

    @property
    def marks(self) -> int:
        """Ids that name a kind of value."""
        return self.values if self.values > 1 else 0


class Spread(NamedTuple):
    """B rows of N abstract ids: filler from 0, ``half`` keys, ``half`` values (an equal part for each kind), marks."""

    inputs: Ints
    """(B, N)."""
    values: Ints
    """(B, P, V)."""
    places: Ints
    """(B, P, V): the key of each pair."""
    queries: Ints
    """(B, P, V): the last token of each query, one before the answer's place."""


def draw_spread(rng: np.random.Generator, count: int, layout: Layout, *, filler: int, half: int) -> Spread:
    """``count`` rows as the module describes them, of a layout that fits."""
    pairs, kinds = layout.pairs, layout.values
    shape, size = (count, pairs, kinds), half // kinds
    keys = np.broadcast_to(filler + choices(rng, count, half, pairs)[..., None], shape)
    chosen = np.stack([choices(rng, count, size, pairs) for _ in range(kinds)], axis=2)
    values = filler + half + size * np.arange(kinds) + chosen
    inputs = rng.integers(0, filler, (count, layout.length))
    places = 2 * choices(rng, count, layout.span // 2, pairs * kinds)
    queries = layout.span + layout.gap + layout.step * choices(rng, count, layout.slots, pairs * kinds)
    for at, tokens in ((places, keys), (places + 1, values), (queries, keys)):
        np.put_along_axis(inputs, at, tokens.reshape(count, -1), axis=1)
    if kinds > 1:
        marks = np.broadcast_to(filler + 2 * half + np.arange(kinds), shape)
        queries = queries + 1
        np.put_along_axis(inputs, queries, marks.reshape(count, -1), axis=1)
    return Spread(inputs, values, places.reshape(shape), queries.reshape(shape))


class SpreadMQAR:
    """The task ``mqar`` with ``spread`` on a model's vocabulary.

    ``symbols`` (S,) token ids stand for the abstract ones, an eighth of them filler.

    A causal model answers at the end of the query, a masked one at a mask behind it. The options are the values of one
    kind. Cells without room for their pairs are left out.
    """

    axes = ("pairs", "length")

    def __init__(self, settings: MQARSettings, symbols: Ints, mask_id: int | None) -> None:
        assert settings.lengths is not None
        self.settings, self.symbols, self.mask_id = settings, symbols, mask_id
        self.filler = len(symbols) // 8
        most, kinds = max(settings.pairs), settings.values
        self.half = (len(symbols) - self.filler - (kinds if kinds > 1 else 0)) // 2
        if self.half // kinds < 2 * most:
            raise UserError(
                f"--symbols {len(symbols)} are too few for {most} keys with {kinds} value(s): --symbols "
                f"{5 * most * kinds} or more, or fewer --pairs or --values"
            )
        layouts = {(pairs, n): self._layout(pairs, n) for pairs in settings.pairs for n in settings.lengths}
        self.cells: Sequence[Cell] = [
            Cell(f"{pairs} pairs, length {length}", length, {"pairs": pairs, "length": length})
            for (pairs, length), layout in layouts.items()
            if layout.fits
        ]
        if not self.cells:
            raise UserError(
                f"rows of {max(settings.lengths)} tokens have no room for {min(settings.pairs)} keys with {kinds} "
                f"value(s) in their first {settings.spread:.0%} and as many queries in the rest: longer --lengths, "
                "fewer --pairs, another --spread or a smaller --gap"
            )

    def _layout(self, pairs: int, length: int) -> Layout:
        return Layout(length, pairs, self.settings.values, self.settings.spread, self.settings.gap)

    def rows(self, cell: Cell, rng: np.random.Generator, count: int, *, training: bool) -> Questions:
        """``count`` rows. Control ``without``: the pairs have other values of their kind, none of them an option."""
        pairs, kinds = cell.facts["pairs"], self.settings.values
        drawn = draw_spread(rng, count, self._layout(pairs, cell.length), filler=self.filler, half=self.half)
        pools = np.arange(self.filler + self.half, self.filler + 2 * self.half)[: kinds * (self.half // kinds)]
        spare = np.stack(
            [
                [rng.permutation(np.setdiff1d(pool, row[:, kind]))[:pairs] for row in drawn.values]
                for kind, pool in enumerate(np.split(pools, kinds))
            ],
            axis=2,
        )
        without = drawn.inputs.copy()
        np.put_along_axis(without, drawn.places.reshape(count, -1) + 1, spare.reshape(count, -1), axis=1)
        inputs, without = self.symbols[drawn.inputs], self.symbols[without]
        queries = drawn.queries.reshape(count, -1)
        at = queries
        if self.mask_id is not None:
            at = queries + 1
            for rows in (inputs, without):
                np.put_along_axis(rows, at, self.mask_id, axis=1)
        # (B, P, V, P): a question's options are the values of its kind, of all keys.
        options = np.broadcast_to(self.symbols[drawn.values].transpose(0, 2, 1)[:, None], (count, pairs, kinds, pairs))
        answer = np.broadcast_to(np.arange(pairs)[:, None], (count, pairs, kinds)).reshape(count, -1).copy()
        distance = (drawn.queries - drawn.places).reshape(count, -1)
        return Questions(inputs, at, options.reshape(count, -1, pairs).copy(), answer, distance, {"without": without})
