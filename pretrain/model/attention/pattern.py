"""Which form of attention, or kind of positions, a layer has: one name for all of them, or a pattern that is repeated.

A pattern of p names gives layer i (from 0) the name i mod p. The number of layers need not be a multiple of p: the last
repetition is cut. This module imports nothing of the project: a configuration is read with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

Pattern: TypeAlias = str | tuple[str, ...]
"""One name, or the names of a pattern."""
Attention: TypeAlias = Pattern
"""One form's name, or the names of a pattern."""


def shortest(names: Sequence[str]) -> Attention:
    """The shortest pattern that repeats to ``names``, at least one; a single name as itself.

    So one model has one description, and ``[nystrom]`` is ``nystrom`` in every file and hash.
    """
    whole = tuple(names)
    for period in range(1, len(whole) + 1):
        if len(whole) % period == 0 and whole[:period] * (len(whole) // period) == whole:
            return whole[0] if period == 1 else whole[:period]
    raise ValueError("a pattern has at least one name")


def by_layer(attention: str | Sequence[str], num_layers: int) -> tuple[str, ...]:
    """The name that each layer has, from the first layer on."""
    names = (attention,) if isinstance(attention, str) else tuple(attention)
    return tuple(names[number % len(names)] for number in range(num_layers))


def label(attention: str | Sequence[str], num_layers: int) -> str:
    """For people: ``nystrom``, or each name with its number of layers, ``window x4 + nystrom x2``."""
    if isinstance(attention, str):
        return attention
    counts = Counter(by_layer(attention, num_layers))
    return " + ".join(f"{name} x{count}" for name, count in counts.items())


def written(attention: str | Sequence[str]) -> str:
    """As in a file: ``nystrom``, or ``[window, window, nystrom]``."""
    return attention if isinstance(attention, str) else f"[{', '.join(attention)}]"
