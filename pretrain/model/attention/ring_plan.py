"""Which token goes where in a ring, and what a new token sees: computed once and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.cache import DecodingStep


@dataclass(frozen=True)
class RingSize:
    """What a ring for texts of up to L tokens holds for each row and layer, and who reads it."""

    slots: int
    """r, tokens whose keys and values are in the ring: position t is in slot t mod r."""
    window: Window | None = None
    """What a token sees of it; None: all."""
    landmarks: int = 0
    """m, as many as the last token can see; with ``window``."""
    history: int = 0
    """Tokens whose keys and values are kept for B V: m c, or 0 for pooled values."""
    conv_kernel: int = 0
    """Taps of the skip convolution, which reads the same values."""

    @property
    def segment_length(self) -> int:
        """c; 1 without a window."""
        return self.window.segment_length if self.window else 1


@dataclass(frozen=True, eq=False)
class Prompts:
    """A forward pass over prompts. Indices are into the batch flattened to (B * N)."""

    slots: Tensor
    """(B, r or fewer): the token for each slot of the ring; any token of its row where there is none."""
    tail: Tensor
    """(B, c): the tokens of the last segment where that is not complete, then any."""
    in_tail: Tensor
    """(B, 1, c, 1) bool: which of those count."""
    segments: Tensor
    """(B, S * c): the tokens of complete segments; any where a row has fewer of them."""

    @classmethod
    def plan(cls, starts: np.ndarray, lengths: np.ndarray, size: RingSize, device: torch.device) -> Prompts:
        """One prompt for each row: ``starts`` and ``lengths`` (B,) int64 in the flattened batch."""
        first, total = (torch.from_numpy(x).to(device)[:, None] for x in (starts, lengths))
        longest, segment = int(lengths.max()), size.segment_length

        def among(positions: Tensor) -> Tensor:
            return first + torch.where((positions >= 0) & (positions < total), positions, 0)

        used = torch.arange(min(size.slots, longest), device=device)
        tail = total // segment * segment + torch.arange(segment, device=device)
        complete = min(longest // segment, size.landmarks) * segment
        return cls(
            slots=among(total - 1 - (total - 1 - used) % size.slots),
            tail=among(tail),
            in_tail=(tail < total)[:, None, :, None],
            segments=among(torch.arange(complete, device=device).expand(len(lengths), -1)),
        )

    @staticmethod
    def take(x: Tensor, index: Tensor) -> Tensor:
        """(B, N, H, d) -> (B, H, n, d) by an index (B, n)."""
        return x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:]).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Completed:
    """The R rows whose segment a step completes."""

    rows: Tensor
    """(R,) int64."""
    segment: Tensor
    """(R,) int64: the number of the segment, and of its landmark."""
    positions: Tensor
    """(R, c) int64: where its tokens stand in their text."""
    slots: Tensor
    """(R, c) int64: and in the ring."""
    count: int = field(kw_only=True)
    """One more than the largest number in ``segment``."""

    @classmethod
    def plan(cls, lengths: np.ndarray, size: RingSize, device: torch.device) -> Completed | None:
        """For one more token behind texts of ``lengths`` tokens; None if no segment gets complete that needs a
        landmark."""
        every = size.segment_length
        rows = np.flatnonzero(((lengths + 1) % every == 0) & (lengths // every < size.landmarks))
        if not len(rows):
            return None
        segment = lengths[rows] // every
        positions = segment[:, None] * every + np.arange(every)
        places = [torch.from_numpy(x).to(device) for x in (rows, segment, positions, positions % size.slots)]
        return cls(*places, count=int(segment.max()) + 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class RingStep(DecodingStep):
    """A forward pass over one new token for each row, with the places where it goes."""

    rows: Tensor
    """(B,) int64: 0 to B - 1."""
    slot: Tensor
    """(B,) int64, of the new token in the ring."""
    hidden: Tensor
    """(B, 1, slots read and then landmarks read) bool: what the new token does not see."""
    taps: Tensor
    """(B, slots read) int64: the tap of the skip convolution that falls on each slot; conv_kernel for none."""
    completed: Completed | None

    @classmethod
    def plan(cls, lengths: np.ndarray, position: Tensor, size: RingSize) -> RingStep:
        """Behind texts of ``lengths`` (B,) tokens; ``position`` (B,) is the same on the device."""
        kernel, device = size.conv_kernel, position.device
        segment, window = size.window or (1, 1)
        end = int(lengths.max()) + 1
        landmarks = min(max((end - 1) // segment - window + 1, 0), size.landmarks)
        near = size.slots if landmarks else min(size.slots, end)
        t = position[:, None]
        age = (t - torch.arange(near, device=device)) % size.slots  # how many tokens ago each slot was written
        seen = t if size.window is None else torch.minimum(t, (window - 1) * segment + t % segment)
        far = torch.arange(landmarks, device=device) > t // segment - window
        return cls(
            len(lengths),
            1,
            end=end,
            position=position,
            rows=torch.arange(len(lengths), device=device),
            slot=position % size.slots,
            hidden=torch.cat([age > seen, far], dim=1)[:, None],
            taps=torch.where((age <= t) & (age < kernel), kernel - 1 - age, kernel),
            completed=Completed.plan(lengths, size, device),
        )
