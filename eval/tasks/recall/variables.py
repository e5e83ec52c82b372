"""Variable tracking (RULER, Hsieh et al. 2024, arXiv 2404.06654, section 3): chains of assignments in filler.

A row of N tokens with C chains of h hops is

* C (h + 1) assignments of two tokens, ``X1 value``, ``X2 X1``, ``X3 X2`` and so on, at even places drawn without
  replacement. Those of a chain stand in their order; chains are interleaved at random.
* At the end the questions: the name of a variable and a place for the answer, in random order.
* Filler everywhere else, uniform over ids of its own.

The published task writes ``VAR X2 = X1`` in text and asks for the names that have a value. Here the value of a name is
asked for, as options need, and names and values are tokens of the model's vocabulary. No hops: pairs, as in ``mqar``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from eval.tasks.recall import VariablesSettings
from eval.tasks.recall.questions import Cell, Ints, Questions, choices


class Chains(NamedTuple):
    """B rows of N abstract ids: filler from 0, ``half`` names, ``half`` values."""

    inputs: Ints
    """(B, N)."""
    values: Ints
    """(B, C)."""
    places: Ints
    """(B, C, h + 1): the name that each assignment begins with, in the order of the chain."""
    questions: Ints
    """(B, C, h + 1), or (B, C, 1) where only the last variable of each chain is asked for: the name's place."""


def room(chains: int, hops: int, *, every: bool) -> int:
    """Tokens of the shortest row."""
    return 2 * chains * (hops + 1) + 2 * chains * (hops + 1 if every else 1)


def draw(
    rng: np.random.Generator, count: int, *, length: int, chains: int, hops: int, filler: int, half: int, every: bool
) -> Chains:
    """``count`` rows as the module describes them; ``every``: all variables are asked for, not only the last ones."""
    size = hops + 1
    total, asked = chains * size, chains * (size if every else 1)
    names = filler + choices(rng, count, half, total).reshape(count, chains, size)
    values = filler + half + choices(rng, count, half, chains)
    inputs = rng.integers(0, filler, (count, length))
    slots = 2 * np.sort(choices(rng, count, (length - 2 * asked) // 2, total), axis=1)
    # Which chain each assignment belongs to, in the order of the row; those of a chain then stand in their order.
    owner = rng.permuted(np.tile(np.repeat(np.arange(chains), size), (count, 1)), axis=1)
    order = np.argsort(owner, axis=1, kind="stable")
    places = np.take_along_axis(slots, order, axis=1).reshape(count, chains, size)
    said = np.concatenate([values[..., None], names[..., :-1]], axis=2)
    questions = length - 2 * asked + 2 * choices(rng, count, asked, asked)
    names_asked = names if every else names[..., -1:]
    for at, tokens in ((places, names), (places + 1, said), (questions, names_asked)):
        np.put_along_axis(inputs, at.reshape(count, -1), tokens.reshape(count, -1), axis=1)
    return Chains(inputs, values, places, questions.reshape(names_asked.shape))


class Variables:
    """The task on a model's vocabulary: ``symbols`` (S,) token ids stand for the abstract ones, an eighth of them
    filler.

    A causal model answers at the name. A masked model finds a mask behind it, in a place that is filler for the causal
    one. The options are the values of all chains.
    """

    axes = ("hops", "length")

    def __init__(self, settings: VariablesSettings, symbols: Ints, mask_id: int | None) -> None:
        assert settings.lengths is not None
        self.symbols, self.mask_id = symbols, mask_id
        self.filler = len(symbols) // 8
        self.half = (len(symbols) - self.filler) // 2
        most, hops = max(settings.chains), max(settings.hops)
        if self.half < max(2 * most, most * (hops + 1)):
            names = max(2, hops + 1) * most
            raise UserError(
                f"--symbols {len(symbols)} are too few for {most} chains of {hops} hops: --symbols {5 * names // 2} "
                "or more, fewer --chains or --hops"
            )
        self.cells: Sequence[Cell] = [
            Cell(
                f"{hops} hops, {chains} chains, length {length}",
                length,
                {"hops": hops, "chains": chains, "length": length},
            )
            for hops in settings.hops
            for chains in settings.chains
            for length in settings.lengths
            if room(chains, hops, every=False) <= length
        ]
        if not self.cells:
            least = room(min(settings.chains), min(settings.hops), every=False)
            raise UserError(
                f"rows of {max(settings.lengths)} tokens have no room for {min(settings.chains)} chains of "
                f"{min(settings.hops)} hops and their questions: --lengths {least} or more, fewer --chains or --hops"
            )

    def rows(self, cell: Cell, rng: np.random.Generator, count: int, *, training: bool) -> Questions:
        """``count`` rows. Control ``without``: the chains begin with other values, none of them an option."""
        chains = cell.facts["chains"]
        drawn = draw(
            rng,
            count,
            length=cell.length,
            chains=chains,
            hops=cell.facts["hops"],
            filler=self.filler,
            half=self.half,
            every=False,
        )
        pool = self.filler + self.half + np.arange(self.half)
        spare = np.stack([rng.permutation(np.setdiff1d(pool, row))[:chains] for row in drawn.values])
        first, queries = drawn.places[..., 0], drawn.questions[..., 0]
        without = drawn.inputs.copy()
        np.put_along_axis(without, first + 1, spare, axis=1)
        inputs, without = self.symbols[drawn.inputs], self.symbols[without]
        at = queries
        if self.mask_id is not None:
            at = queries + 1
            for rows in (inputs, without):
                np.put_along_axis(rows, at, self.mask_id, axis=1)
        options = np.broadcast_to(self.symbols[drawn.values][:, None, :], (count, chains, chains)).copy()
        answer = np.broadcast_to(np.arange(chains), (count, chains)).copy()
        return Questions(inputs, at, options, answer, queries - first, {"without": without})
