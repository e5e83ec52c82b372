"""Packing documents into a given number of blocks: best fit decreasing, and cutting only what is left over.

Best fit decreasing (Johnson 1974; for documents of a language model Ding et al. 2024, "Fewer Truncations Improve
Language Modeling") takes the items from the longest to the shortest. It puts each where the least space is left. Here
the number of bins is given beforehand, so that places in an epoch follow by arithmetic; what fits nowhere whole is cut
to fill the space that is left. Nothing is random and nothing is lost.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Segments, stretches of the stream, in the blocks of one window, in the order of their places.

    All (S,). ``at`` is the place in the window's blocks laid end to end: block ``at // block_length``, column
    ``at % block_length``; no segment leaves its block.
    """

    at: np.ndarray
    """int64."""
    starts: np.ndarray
    """int64, first token's position in the stream."""
    lengths: np.ndarray
    """int64, at least 1."""
    closes: np.ndarray
    """bool, the segment's last token is its document's last token."""


def pack(bounds: np.ndarray, num_blocks: int, block_length: int, slice_length: int) -> Packed:
    """Place consecutive documents in ``num_blocks`` blocks of ``block_length`` tokens.

    Document i is the stream's ``[bounds[i], bounds[i + 1])``; ``bounds`` (D + 1,) int64 increasing. A block is read
    whole or in slices of ``slice_length`` (which divides ``block_length``), so what fits a slice should not lie across
    two of them:

    1. Documents longer than a block are cut in order into whole blocks and a remainder.
    2. Pieces longer than a slice go to the block with the least room for them, one behind the other.
    3. Shorter pieces go to the slice with the least room for them.
    4. A piece that found no place goes across slices if a block has the room in one stretch, and is cut otherwise.

    Raises ``ValueError`` if the blocks hold fewer tokens than the documents have.
    """
    total = int(bounds[-1] - bounds[0])
    if total > num_blocks * block_length:
        raise ValueError(f"{total} tokens do not fit into {num_blocks} blocks of {block_length}")
    starts, lengths = _pieces(bounds, block_length)
    at = np.full(len(starts), -1, dtype=np.int64)

    long = np.flatnonzero(lengths > slice_length)
    block_room = np.full(num_blocks, block_length, dtype=np.int64)
    at[long] = _place(lengths[long], block_room, np.arange(1, num_blocks + 1) * block_length)

    # Each block is now used from its start, and what is free in a slice lies at the slice's end.
    slice_ends = np.arange(1, num_blocks * (block_length // slice_length) + 1, dtype=np.int64) * slice_length
    slices = slice_ends.reshape(num_blocks, -1)
    free_from = (np.arange(1, num_blocks + 1) * block_length - block_room)[:, None]
    room = np.clip(slices - free_from, 0, slice_length).reshape(-1)
    short = np.flatnonzero(lengths <= slice_length)
    at[short] = _place(lengths[short], room, slice_ends)

    left = np.flatnonzero(at < 0)
    if not len(left):
        for bin_length in (block_length, slice_length):
            _spread(at, lengths, bin_length, num_blocks * (block_length // bin_length))
        return _finish(bounds, at, starts, lengths)
    stretch_room, stretch_ends = _stretches(room, slice_ends, slice_length)
    at[left] = _place(lengths[left], stretch_room, stretch_ends)
    whole, left = np.flatnonzero(at >= 0), np.flatnonzero(at < 0)
    parts = _cut(starts[left], lengths[left], stretch_room, stretch_ends)
    segments = np.concatenate([np.stack([at[whole], starts[whole], lengths[whole]]), parts], axis=1)
    return _finish(bounds, *segments)


def _pieces(bounds: np.ndarray, block_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of the documents cut into pieces of at most a block, in the order of the stream."""
    sizes = np.diff(bounds)
    counts = -(-sizes // block_length)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(bounds[:-1], counts) + within * block_length
    return starts, np.minimum(np.repeat(bounds[1:], counts) - starts, block_length)


def _place(lengths: np.ndarray, room: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Places (n,) of pieces in bins that are free from ``ends - room`` to ``ends``, -1 for pieces that fit nowhere.

    ``room`` (M,) is lowered by what was placed.
    """
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), dtype=np.int64)
    bins[order] = best_fit(lengths[order], room)
    at = np.full(len(lengths), -1, dtype=np.int64)
    order = order[np.argsort(bins[order], kind="stable")]  # by bin, then as placed
    order = order[bins[order] >= 0]
    if not len(order):
        return at
    bin_of, size = bins[order], lengths[order]
    before = np.cumsum(size) - size
    first = np.flatnonzero(np.diff(bin_of, prepend=-1))
    before -= np.repeat(before[first], np.diff(np.append(first, len(order))))
    at[order] = ends[bin_of] - room[bin_of] + before
    np.subtract.at(room, bin_of, size)
    return at


def best_fit(lengths: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Bins (n,) int64 of items, taken in their order: each goes to the bin with the least room for it, -1 if none has.

    ``lengths`` (n,) >= 1, decreasing; ``room`` (M,) >= 0, not changed. Bins of equal room are interchangeable, so each
    run of equal items is dealt to all bins of one room at once: windows of many short documents take few steps.
    """
    stacks: dict[int, list[int]] = {}  # room left -> bins, the next to take at the end
    open_bins = np.flatnonzero(room)[::-1]
    for number, free in zip(open_bins.tolist(), room[open_bins].tolist(), strict=True):
        stacks.setdefault(free, []).append(number)
    rooms = sorted(stacks)
    out: list[int] = []

    def give_back(left: int, bins: list[int]) -> None:
        if left and bins:
            if left not in stacks:
                stacks[left] = []
                insort(rooms, left)
            stacks[left] += bins

    values, counts = np.unique(-lengths, return_counts=True)
    for length, count in zip((-values).tolist(), counts.tolist(), strict=True):
        while count:
            found = bisect_left(rooms, length)
            if found == len(rooms):
                out += [-1] * count
                break
            size = rooms[found]
            stack = stacks[size]
            # A bin that took one is the fullest that can take another: it is filled before the next one is touched.
            copies = size // length
            taken = stack[: -1 - min(len(stack), -(-count // copies)) : -1]
            del stack[-len(taken) :]
            if not stack:
                del stacks[size], rooms[found]
            last = min(count - (len(taken) - 1) * copies, copies)
            for number in taken[:-1]:
                out += [number] * copies
            out += [taken[-1]] * last
            give_back(size - copies * length, taken[:-1])
            give_back(size - last * length, taken[-1:])
            count -= (len(taken) - 1) * copies + last
    return np.array(out, dtype=np.int64)


def _spread(at: np.ndarray, lengths: np.ndarray, bin_length: int, num_bins: int) -> None:
    """Move pieces, in place, to bins that are still empty: a row of nothing but padding trains nothing.

    Only the last piece of a bin moves, and only if another one stays there; the longest go first.
    """
    first, last = at // bin_length, (at + lengths - 1) // bin_length
    pieces_in = np.cumsum(np.bincount(first, minlength=num_bins + 1) - np.bincount(last + 1, minlength=num_bins + 1))[
        :num_bins
    ]
    empty = np.flatnonzero(pieces_in == 0)
    order = np.argsort(at, kind="stable")
    movable = order[np.append(np.diff(first[order]) > 0, True)]  # the last one to begin in its bin
    movable = movable[(first == last)[movable] & (pieces_in[first[movable]] > 1)]
    movable = movable[np.argsort(-lengths[movable], kind="stable")][: len(empty)]
    at[movable] = empty[: len(movable)] * bin_length


def _stretches(room: np.ndarray, ends: np.ndarray, slice_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(room, ends) of what is free in one stretch: a slice's free end and the empty slices behind it.

    A stretch ends with its block, for no block begins with an empty slice as long as a piece is left over. A long piece
    would have found that block empty, a short one would have found that slice.
    """
    continues = np.zeros(len(room), dtype=bool)
    continues[1:] = (room[1:] == slice_length) & (room[:-1] > 0)
    first = np.flatnonzero((room > 0) & ~continues)
    lengths = np.add.reduceat(room, first)
    return lengths, ends[first] - room[first] + lengths


def _cut(starts: np.ndarray, lengths: np.ndarray, room: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(3, S): at, starts, lengths of the parts of pieces that fit nowhere whole: few, in order of place."""
    free = sorted((size, number) for number, size in enumerate(room.tolist()) if size)
    out: list[tuple[int, int, int]] = []
    for start, rest in zip(starts.tolist(), lengths.tolist(), strict=True):
        parts: list[tuple[int, int]] = []
        while rest:
            found = min(bisect_left(free, (rest, -1)), len(free) - 1)  # the least room for the rest, or the most
            size, number = free.pop(found)
            part = min(size, rest)
            parts.append((int(ends[number]) - size, part))
            rest -= part
            if size > part:
                insort(free, (size - part, number))
        for at, part in sorted(parts):
            out.append((at, start, part))
            start += part
    return np.array(out, dtype=np.int64).reshape(-1, 3).T


def _finish(bounds: np.ndarray, at: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Packed:
    order = np.argsort(at, kind="stable")
    at, starts, lengths = at[order], starts[order], lengths[order]
    stops = starts + lengths
    return Packed(at, starts, lengths, bounds[np.searchsorted(bounds, stops)] == stops)
