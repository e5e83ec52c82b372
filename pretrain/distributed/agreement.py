"""Were all processes of a run started alike? Compared where they meet, before anything is built or written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

MOST_NAMED = 5
"""Differences that a message names."""
_COMPARED, _ALL_COMPARED, _DIFFERENT = "compared", "all compared", "started differently"


def facts_key(rank: int) -> str:
    """The store's key for what a process was started with; it exists from the process's arrival on."""
    return f"facts/{rank}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as one level of dotted keys and JSON texts, which can be compared and shown."""
    out: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        out |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: json.dumps(value, default=str)}
    return out


def differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What differs between the facts of two processes, in words."""
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    named = [f"{key} is {other.get(key, 'absent')} instead of {first.get(key, 'absent')}" for key in keys[:MOST_NAMED]]
    return named + ([f"and {len(keys) - MOST_NAMED} more"] if len(keys) > MOST_NAMED else [])


def agree(
    store: dist.Store, rank: int, world_size: int, names: Callable[[int], str], wait: Callable[[dist.Store, str], None]
) -> None:
    """Compare this process with the first one; returns on all processes, or raises the same :class:`UserError` on all.

    All facts must be in the store. ``names(rank)`` is how a person finds a process; ``wait(store, key)`` returns when
    there is a key.
    """
    first, own = (json.loads(store.get(facts_key(number))) for number in (0, rank))
    different = differences(first, own)
    if different:
        # The first to say so is the one that all report.
        store.compare_set(
            _DIFFERENT,
            "",
            f"{names(rank)} was started differently from {names(0)}: {'; '.join(different)}. All processes of a run "
            "need the same configuration, code and packages",
        )
    if store.add(_COMPARED, 1) == world_size:
        store.set(_ALL_COMPARED, "")
    wait(store, _ALL_COMPARED)
    if store.check([_DIFFERENT]):
        raise UserError(store.get(_DIFFERENT).decode())
