"""Decoding cache of a causal layer: a ring buffer of near tokens, and landmarks.

One more token costs O(w c + m) and not another forward pass.

For each row, with H heads of width d, segments of c tokens, a window of w segments and texts of up to L tokens:

* a ring buffer with the keys and values of the last r = w c tokens (more if the skip convolution, which reads the same
  values, is wider than the window). Exact attention keeps all tokens, r = L;
* behind the ring, in the same tensors: the keys k~ and values W of m = ceil(L / c) - w landmarks, as many as the last
  token can see, and their masses M. A step reads ring and landmarks with one product;
* the sum of the queries of the segment that is not complete yet, from which its landmark's query will come;
* for values through the triangular inverse, and for tokens that read some far segments exactly, the keys and values of
  those m segments. B V of a new landmark looks at all of them, a token at k c of them. Such a cache is a little larger
  than that of exact attention.

Keys and values have the dtype of the model, for that is what the forward pass reads with. M and the sums have at least
float32: a sum over a segment in bfloat16 would lose its last queries. The triangular solve continues from landmarks in
the model's dtype; what their rounding does to later ones is bounded as the inverse is, by 1 / (2 g - 1).

The landmark of a segment is made in the step that completes it, for the rows that do, and is seen w segments later. It
costs O(c), and with the inverse O(n) once in c tokens, which is O(m) for each.

Which token goes where in the ring, and what a new token sees, is planned once for each pass and shared by all layers:
:class:`Prompts` and :class:`RingStep`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.cache import Cache, DecodingStep, LayerCache
from pretrain.model.attention.causal_nystrom import (
    Landmarks,
    causal_landmarks,
    landmark_queries,
    next_value,
    pool_segments,
)
from pretrain.model.attention.form import Given
from pretrain.model.attention.landmark_slots import LandmarkSlots, PromptNodes, Rise, rises
from pretrain.model.attention.pyramid import FLAT, Level, Pyramid, merge
from pretrain.model.attention.recall import choose_tokens
from pretrain.model.compute import at_least_float32

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig


@dataclass(frozen=True)
class RingSize:
    """What a ring for texts of up to L tokens holds for each row and layer, and who reads it."""

    slots: int
    """r, tokens whose keys and values are in the ring: position t is in slot t mod r."""
    window: Window | None = None
    """What a token sees of it; None: all."""
    landmarks: int = 0
    """m, segments with a landmark: as many as the last token can see; with ``window``."""
    pyramid: Pyramid = FLAT
    """Which of these landmarks, and of their parents, a token sees."""
    history: int = 0
    """Tokens whose keys and values are kept for B V, or to be read again: m c, or 0."""
    recall: int = 0
    """Far segments that a token reads exactly; with ``history``."""
    conv_kernel: int = 0
    """Taps of the skip convolution, which reads the same values."""

    @property
    def segment_length(self) -> int:
        """c; 1 without a window."""
        return self.window.segment_length if self.window else 1

    @cached_property
    def far(self) -> LandmarkSlots:
        """Where landmarks are kept."""
        return LandmarkSlots(self.landmarks, self.window.segments if self.window else 1, self.pyramid)


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
    nodes: PromptNodes
    """Which of their landmarks and parents of landmarks go into which slot."""

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
            nodes=PromptNodes.plan(size.far, total[:, 0] // segment),
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
    place: Tensor = field(kw_only=True)
    """(R,) int64: the slot of the landmark."""
    rises: tuple[Rise, ...] = field(kw_only=True)
    """The parents that get complete with it."""

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
        place = torch.from_numpy(segment % size.far.sizes[0]).to(device)
        return cls(*places, count=int(segment.max()) + 1, place=place, rises=rises(size.far, rows, segment, device))


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
        landmarks = size.far.read(min(max((end - 1) // segment - window + 1, 0), size.landmarks))
        near = size.slots if landmarks else min(size.slots, end)
        t = position[:, None]
        age = (t - torch.arange(near, device=device)) % size.slots  # how many tokens ago each slot was written
        seen = t if size.window is None else torch.minimum(t, (window - 1) * segment + t % segment)
        far = size.far.hidden(position // segment, landmarks)
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


class Ring(Cache):
    """A ring for near tokens, or all, with or without landmarks behind it.

    Numbers for each row and layer, with hidden size h, H heads and r, m as in :class:`RingSize`: 2 h (r + m) for keys
    and values. Landmarks add m H + h for the masses and the sum; the history adds 2 h m c. Beyond the window, c more
    tokens add 2 h + H; to that of exact attention they add 2 h c. In a pyramid m is the number of slots of all levels,
    which grows with the logarithm of the length, and each level but the last adds a sum of queries, h.
    """

    def __init__(self, config: ModelConfig, size: RingSize, *, weighted: bool = True) -> None:
        """weighted: the landmarks' keys, as in ``causal_nystrom_attention``."""
        self.config, self.size, self.weighted = config, size, weighted

    @classmethod
    def of_everything(cls, config: ModelConfig, max_length: int) -> Ring:
        """All tokens are kept and seen."""
        return cls(config, RingSize(max_length, conv_kernel=config.conv_kernel))

    @classmethod
    def of_window(
        cls,
        config: ModelConfig,
        window: Window,
        max_length: int,
        *,
        landmarks: bool = False,
        history: bool = False,
        weighted: bool = True,
        pyramid: Pyramid = FLAT,
        recall: int = 0,
    ) -> Ring:
        """The tokens of a window, and as many more as the skip convolution is wide. landmarks: beyond the window;
        history: all tokens that these stand for, too, of which each token reads those of ``recall`` segments."""
        c, w = window
        slots = min(c * max(w, -(-config.conv_kernel // c)), max_length)
        m = max(-(-max_length // c) - w, 0) if landmarks else 0
        size = RingSize(slots, window, m, pyramid, m * c if history else 0, min(recall, m), config.conv_kernel)
        return cls(config, size, weighted=weighted)

    def prompts(self, starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Prompts:
        return Prompts.plan(starts, lengths, self.size, device)

    def step(self, lengths: np.ndarray, position: Tensor) -> RingStep:
        return RingStep.plan(lengths, position, self.size)

    def layer(self, rows: int, dtype: torch.dtype, device: torch.device) -> RingLayer:
        return RingLayer(self, rows, dtype, device)

    def elements(self) -> tuple[int, int]:
        size, hidden = self.size, self.config.hidden_size
        kept = 2 * hidden * (size.slots + size.far.total + size.history)
        return kept, size.far.total * self.config.num_heads + hidden * len(size.far.sizes)


class RingLayer(LayerCache):
    """One layer's ring, its landmarks and what these are made of."""

    STATE = ("keys", "values", "mass", "query_sum", "level_sums", "past_keys", "past_values")
    keys: Tensor
    """(B, H, r + m, d): the ring, then k~."""
    values: Tensor
    """(B, H, r + m, d): the ring, then W."""
    mass: Tensor | None = None
    """(B, H, m), M."""
    query_sum: Tensor | None = None
    """(B, H, d), of the tokens of a segment in progress."""
    level_sums: Tensor | None = None
    """(B, H, levels - 1, d), of the nodes that wait for a parent."""
    past_keys: Tensor | None = None
    """(B, H, m * c, d), of complete segments."""
    past_values: Tensor | None = None

    def __init__(self, ring: Ring, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, width, size = ring.config.num_heads, ring.config.head_dim, ring.size
        self.size = size
        self.segment_length = size.segment_length
        self.weighted = ring.weighted
        # Zeros: what is not there yet gets a weight of 0, and 0 times what lies in fresh memory may be NaN.
        self.keys = torch.zeros(rows, heads, size.slots + size.far.total, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        high = at_least_float32(self.keys.dtype)
        if size.landmarks:
            self.mass = torch.zeros(rows, heads, size.far.total, dtype=high, device=device)
            self.query_sum = torch.zeros(rows, heads, width, dtype=high, device=device)
            if (above := len(size.far.sizes) - 1) > 0:
                self.level_sums = torch.zeros(rows, heads, above, width, dtype=high, device=device)
        if size.history:
            self.past_keys = torch.zeros(rows, heads, size.history, width, dtype=dtype, device=device)
            self.past_values = torch.zeros_like(self.past_keys)

    def fill(self, q: Tensor, k: Tensor, v: Tensor, plan: Prompts, given: Given) -> None:
        """As in :class:`LayerCache`. offset and gamma of ``given`` are those of ``causal_nystrom_attention``, which
        makes the same landmarks and does not hand them out: they are made twice."""
        with torch.autocast(q.device.type, enabled=False):
            used = plan.slots.shape[1]
            self.keys[:, :, :used] = plan.take(k, plan.slots)
            self.values[:, :, :used] = plan.take(v, plan.slots)
            if self.query_sum is None:
                return
            tail = plan.take(q, plan.tail).to(self.query_sum.dtype)
            self.query_sum = torch.where(plan.in_tail, tail, 0).sum(dim=2)
            if plan.segments.shape[1]:
                q, k, v = (plan.take(x, plan.segments) for x in (q, k, v))
                self._fill_landmarks(q, k, v, plan.nodes, given)

    def _fill_landmarks(self, q: Tensor, k: Tensor, v: Tensor, nodes: PromptNodes, given: Given) -> None:
        """q, k, v: (B, H, S * c, d) of the first S segments. A row with fewer of them gets landmarks of any tokens for
        the others: no token sees one before its segment is complete, and then it is made anew."""
        assert self.mass is not None
        gamma = given.get("gamma")
        rows, _, length, _ = k.shape
        first, count = self.size.slots, length // self.segment_length
        if self.past_keys is not None and self.past_values is not None:
            self.past_keys[:, :, :length], self.past_values[:, :, :length] = k, v
        queries = landmark_queries(q, self.segment_length, given.get("offset"))
        far = causal_landmarks(
            queries.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            None if gamma is None else gamma.repeat(rows),
            count=count,
            weighted=self.weighted,
        )
        keys, mass, values = (x.unflatten(0, (rows, -1)) for x in far)
        if self.level_sums is not None:
            level = Level(queries, keys, mass, values)
            (_, keys, mass, values), self.level_sums = nodes.keep(level, self.size.pyramid, weighted=self.weighted)
            count = keys.shape[2]
        self.keys[:, :, first : first + count] = keys
        self.values[:, :, first : first + count] = values
        self.mass[:, :, :count] = mass

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, step: RingStep, given: Given, conv_weight: Tensor | None
    ) -> Tensor:
        """As in :class:`LayerCache`. Of ``given``, offset: (H, 1 or R, d) for the R segments that ``step`` completes,
        in its order; gamma: (H,)."""
        with torch.autocast(q.device.type, enabled=False):
            query, key, value = (x[:, 0].to(self.keys.dtype) for x in (q, k, v))
            self.keys[step.rows, :, step.slot] = key
            self.values[step.rows, :, step.slot] = value
            out = self._read(query, step, conv_weight)
            if self.query_sum is not None:
                self.query_sum += query
                if step.completed is not None:
                    self._add_landmarks(step.completed, self.query_sum, given)
            return out.unsqueeze(1).to(v.dtype)

    def _read(self, query: Tensor, step: RingStep, conv_weight: Tensor | None) -> Tensor:
        """(B, H, d) -> (B, H, d). Softmax in at least float32: it is small here. Logits too in float16, which has none
        above 65504. In bfloat16 they are rounded: a copy of all keys would take longer than the read."""
        columns, near = step.hidden.shape[-1], step.taps.shape[1]
        keys, values = self.keys[:, :, :columns], self.values[:, :, :columns]
        if keys.dtype == torch.float16:
            query, keys = query.float(), keys.float()
        query = query * query.shape[-1] ** -0.5
        logits = query.unsqueeze(-2) @ keys.transpose(-1, -2)
        logits = logits.squeeze(-2).to(at_least_float32(query.dtype))
        if self.mass is not None and columns > near:
            logits[:, :, near:] += self.mass[:, :, : columns - near]
        logits = logits.masked_fill_(step.hidden, -torch.inf)
        past_values = None
        if self.past_keys is not None and self.past_values is not None and self.size.recall and columns > near:
            tokens, seen = choose_tokens(logits[:, :, near:], self.size.recall, self.segment_length)
            index = tokens.unsqueeze(-1).expand(-1, -1, -1, query.shape[-1])
            past_keys, past_values = self.past_keys.gather(2, index).to(query.dtype), self.past_values.gather(2, index)
            past = (query.unsqueeze(-2) @ past_keys.transpose(-1, -2)).squeeze(-2).to(logits.dtype)
            logits = torch.cat([logits, past.masked_fill(~seen, -torch.inf)], dim=-1)
        weights = logits.softmax(dim=-1)
        if conv_weight is not None:  # one product for both: the taps are weights of the same values
            taps = F.pad(conv_weight[:, 0, :, 0], (0, 1))
            weights[:, :, :near] += taps[:, step.taps].transpose(0, 1)
        weights = weights.to(values.dtype).unsqueeze(-2)
        out = weights[..., :columns] @ values
        return (out if past_values is None else out + weights[..., columns:] @ past_values).squeeze(-2)

    def _add_landmarks(self, done: Completed, query_sum: Tensor, given: Given) -> None:
        assert self.mass is not None
        gamma = given.get("gamma")
        query = query_sum[done.rows] / self.segment_length  # (R, H, d)
        if (offset := given.get("offset")) is not None:
            query = query + offset.transpose(0, 1)
        query_sum[done.rows] = 0
        own = (done.rows[:, None], slice(None), done.slots)
        k, v = self.keys[own], self.values[own]  # (R, c, H, d)
        one = (x.transpose(1, 2).flatten(0, 1).unsqueeze(1) for x in (k, v))
        far = pool_segments(query.flatten(0, 1).unsqueeze(1), *one, weighted=self.weighted)
        keys, mass, pooled = (x.squeeze(1).unflatten(0, query.shape[:2]) for x in far)

        place = (done.rows, slice(None), self.size.slots + done.place)
        self.keys[place] = keys.to(self.keys.dtype)
        self.mass[done.rows, :, done.place] = mass
        if self.past_keys is not None and self.past_values is not None:
            past = (done.rows[:, None], slice(None), done.positions)
            self.past_keys[past], self.past_values[past] = k, v
        if gamma is not None and self.past_keys is not None and self.past_values is not None:
            first, last, tokens = self.size.slots, self.size.slots + done.count, done.count * self.segment_length
            known = Landmarks(
                self.keys[done.rows, :, first:last],
                self.mass[done.rows, :, : done.count],
                self.values[done.rows, :, first:last],
            )
            history = self.past_keys[done.rows, :, :tokens], self.past_values[done.rows, :, :tokens]
            pooled = next_value(query, pooled, known, *history, done.segment, gamma)
        self.values[place] = pooled.to(self.values.dtype)
        if self.level_sums is not None:
            self.level_sums[done.rows, :, 0] += query
            self._add_parents(done.rises, self.mass, self.level_sums)

    def _add_parents(self, rises: tuple[Rise, ...], mass: Tensor, sums: Tensor) -> None:
        """From children that are as they are kept, in the dtype of the model."""
        for level, (rows, children, slot) in enumerate(rises):
            branching = children.shape[1]
            query = sums[rows, :, level] / branching  # (R, H, d)
            sums[rows, :, level] = 0
            own = (rows[:, None], slice(None), self.size.slots + children)
            key, value = (x[own].transpose(1, 2).to(query.dtype) for x in (self.keys, self.values))  # (R, H, r, d)
            entropy = mass[rows[:, None], :, children].transpose(1, 2)
            merged = merge(query, key, entropy, value, weighted=self.weighted)
            place = (rows, slice(None), self.size.slots + slot)
            self.keys[place], self.values[place] = (x.to(self.keys.dtype) for x in (merged.keys, merged.values))
            mass[rows, :, slot] = merged.mass
            if level + 1 < sums.shape[2]:
                sums[rows, :, level + 1] += query
