"""Where a decoding cache keeps landmarks and their parents: a ring for each level of the pyramid.

A text of n tokens has n / c landmarks, and a token sees b + r of each level. A level therefore needs as many slots as
nodes lie between the oldest one that is seen and the newest one that is complete: at most (b + r) r / (r - 1) + w,
whatever n is. With O(log n) levels this is a counter in base r: r nodes complete a digit, and their parent is a node of
the next one. Node j of a level with K slots is in slot j mod K. Flat landmarks have one level with a slot for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.model.attention.pyramid import Level, Pyramid, parents


@dataclass(frozen=True)
class LandmarkSlots:
    """The slots of all levels, one level behind the other, for texts with up to ``landmarks`` far segments."""

    landmarks: int
    """m, segments that the last token of a text sees beyond its window."""
    window_segments: int
    """w."""
    pyramid: Pyramid

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Slots by level."""
        w, r = self.window_segments, self.pyramid.branching
        most = self.pyramid.band + r - 1  # nodes of a level that are seen, unless it is the last
        depth = len(self.pyramid.edges(self.landmarks)) - 1
        found = []
        for level in range(depth):
            span = r**level
            nodes = self.landmarks // span
            # Those seen; those of finer levels, which hide nodes that are complete; and the window, which does so too.
            waiting = (w - 1 + most * ((span - 1) // (r - 1)) + most * span) // span
            found.append(nodes if level == self.pyramid.levels - 1 else min(nodes, max(waiting, r)))
        return tuple(found)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first slot of each level, and the number of all of them."""
        return (0, *np.cumsum(self.sizes, dtype=int).tolist()) if self.sizes else (0,)

    @property
    def total(self) -> int:
        """All slots."""
        return self.starts[-1]

    def read(self, far: int) -> int:
        """How many slots, from the first, hold all that tokens with up to ``far`` segments before their window see."""
        depth = len(self.pyramid.edges(far)) - 1
        return min(far, self.total) if depth <= 1 else self.starts[depth]

    def _nodes(self, complete: Tensor, level: int) -> Tensor:
        """(B, slots of the level) int64: the node in each slot once ``complete`` (B,) segments are; negative: none."""
        newest = complete[:, None].clamp(max=self.landmarks) // self.pyramid.branching**level - 1
        slots = torch.arange(self.sizes[level], device=complete.device)
        return newest - (newest - slots) % self.sizes[level]

    def hidden(self, segment: Tensor, read: int) -> Tensor:
        """(B, read) bool: which slots a token of segment number ``segment`` (B,) does not see."""
        depth = sum(start < read for start in self.starts[:-1])
        if not depth:
            return torch.ones(len(segment), 0, dtype=torch.bool, device=segment.device)
        far = (segment - self.window_segments + 1).clamp(min=0)
        firsts, lasts = self.pyramid.columns(far, len(self.sizes))
        parts = []
        for level in range(depth):
            node = self._nodes(segment, level)
            parts.append((node < firsts[level][:, None]) | (node >= lasts[level][:, None]))
        return torch.cat(parts, dim=1)[:, :read]


@dataclass(frozen=True, eq=False)
class PromptNodes:
    """What is kept of the landmarks of prompts, of which B have different numbers."""

    nodes: tuple[Tensor, ...]
    """By level, (B, slots): the node for each slot; negative where there is none."""
    waiting: tuple[Tensor, ...]
    """By level but the last, (B, r - 1): nodes that wait for a parent; -1 where there is none."""

    @classmethod
    def plan(cls, slots: LandmarkSlots, complete: Tensor) -> PromptNodes:
        """complete: (B,) int64, complete segments of each prompt."""
        r = slots.pyramid.branching
        complete = complete.clamp(max=slots.landmarks)
        nodes = tuple(slots._nodes(complete, level) for level in range(len(slots.sizes)))
        waiting = []
        for level in range(len(slots.sizes) - 1):
            done = complete[:, None] // r**level
            index = done // r * r + torch.arange(r - 1, device=complete.device)
            waiting.append(torch.where(index < done, index, -1))
        return cls(nodes, tuple(waiting))

    def keep(self, landmarks: Level, pyramid: Pyramid, *, weighted: bool) -> tuple[Level, Tensor | None]:
        """Of landmarks (B, H, n, ...) of the prompts' segments: what goes into the slots, and the sums of waiting
        queries (B, H, levels - 1, d)."""
        rows = landmarks.keys.shape[0]
        level = Level(*(x.flatten(0, 1) for x in landmarks))
        kept, sums = [], []
        for number, index in enumerate(self.nodes):
            if number:
                whole = level.keys.shape[1] // pyramid.branching * pyramid.branching
                level = parents(Level(*(x[:, :whole] for x in level)), pyramid.branching, weighted=weighted)
            nodes = Level(*(x.unflatten(0, (rows, -1)) for x in level))
            kept.append(Level(*(_take(x, index) for x in nodes)))
            if number < len(self.waiting):
                sums.append(_take(nodes.queries, self.waiting[number]).sum(dim=2))
        together = Level(*(torch.cat(parts, dim=2) for parts in zip(*kept, strict=True)))
        return together, torch.stack(sums, dim=2) if sums else None


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, n, ...) by an index (B, k) -> (B, H, k, ...); zeros where it is negative."""
    if not x.shape[2]:
        return x.new_zeros(*x.shape[:2], index.shape[1], *x.shape[3:])
    index = index.reshape(len(index), 1, -1, *[1] * (x.dim() - 3)).expand(-1, x.shape[1], -1, *x.shape[3:])
    return x.gather(2, index.clamp(min=0)).masked_fill(index < 0, 0)


class Rise(NamedTuple):
    """Rows for which a step completes a node of some level above the first."""

    rows: Tensor
    """(R,) int64."""
    children: Tensor
    """(R, r) int64: their slots, among all."""
    slot: Tensor
    """(R,) int64."""


def rises(slots: LandmarkSlots, rows: np.ndarray, segment: np.ndarray, device: torch.device) -> tuple[Rise, ...]:
    """By level from the second on, where ``rows`` (R,) complete the segments of numbers ``segment`` (R,)."""
    found, r = [], slots.pyramid.branching
    for level in range(1, len(slots.sizes)):
        span = r**level
        at = np.flatnonzero((segment + 1) % span == 0)
        if not len(at):
            break
        node = segment[at] // span
        children = slots.starts[level - 1] + (node[:, None] * r + np.arange(r)) % slots.sizes[level - 1]
        slot = slots.starts[level] + node % slots.sizes[level]
        found.append(Rise(*(torch.from_numpy(x).to(device) for x in (rows[at], children, slot))))
    return tuple(found)
