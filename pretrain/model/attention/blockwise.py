"""One softmax over landmarks and a sliding window of tokens, in tiles of segments, linear in memory.

A tile is some segments of some heads. For each of its segments the keys of its window and of the landmarks before it
are laid side by side. Logits, softmax and output are then one batched product, one softmax and one more product, all
contiguous. The backward pass computes a tile's weights again, and nothing of that size is kept. For speed on a CPU
(``python -m benchmarks.attention`` measures the whole):

* every large intermediate lives in a workspace that all tiles of a call share: fresh memory has to be mapped page by
  page;
* the number of landmarks a tile looks at is rounded up to 32: a bfloat16 softmax over 190 columns takes 2.2 times as
  long for each element as one over 192;
* a tile's logits fit the second-level cache.

Logits and softmax are at least float32, whatever the model's precision: in bfloat16 a logit of 20 is off by up to 0.06,
its weight by 6%, and float16 has no logit above 65504. The weights are then rounded to the model's precision, in which
the products with values and gradients are made, as in PyTorch's fused kernels.

This function is the seam for a fused kernel: nothing outside this file knows how the read is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.attention.pyramid import FLAT, Pyramid
from pretrain.model.attention.recall import Choice, add_chosen, add_gradients, hide
from pretrain.model.compute import at_least_float32, device_type


class Window(NamedTuple):
    """A token of segment i sees tokens of segments i - w + 1 to i up to itself, and landmarks of those before."""

    segment_length: int
    """c."""
    segments: int
    """w."""


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_k: Tensor,
    far_v: Tensor,
    far_bias: Tensor,
    window: Window,
    pyramid: Pyramid = FLAT,
    recall: int = 0,
) -> Tensor:
    """Softmax attention, logits scaled by d^-1/2, of every token to its window and to the landmarks before it.

    q, k, v: (B, S * c, d). far_k, far_v: (B, m, d) with m = S - w landmarks, or m = 0 for the window alone. Those of a
    ``pyramid`` are its levels one behind the other, ``pyramid.nodes(S - w)`` of them. far_v has q's dtype, far_k that
    or float32. far_bias: (B, m), added to their logits. ``recall``: each token reads so many far segments, those whose
    landmarks it asks for most, token by token. Returns (B, S * c, d) in q's dtype. Logits, softmax and gradients of the
    landmarks are at least float32, weights have q's precision. Differentiable once.
    """
    if recall and pyramid.levels > 1:
        raise ValueError(
            f"recall {recall} chooses among landmarks of single segments, not among {pyramid.levels} levels"
        )
    recall = min(recall, far_k.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        return _Blockwise.apply(q, k, v, far_k, far_v, far_bias, window, pyramid, recall)


# Bytes of a tile's logits: a CPU wants them in its second-level cache, a GPU wants few launches.
_TILE_BYTES = {"cpu": 2**20}
_TILE_BYTES_GPU = 2**27
_ALIGN = 32
_PARTS = 8
"""Unless tiles get too small, one spans at most one part in so many of the sequence: the first of its segments looks in
vain at the landmarks that only the last one sees."""
_PYRAMID_PARTS = 16
"""In a pyramid each further segment of a tile adds about two columns that most of the others do not see."""


class _Tile(NamedTuple):
    heads: slice
    first: int
    last: int
    far: tuple[slice, ...]
    """Landmark columns by level: some are hidden from some of the tile's segments."""
    visible: int
    """How many, rounded up by columns that nobody sees."""


class _Reach:
    """Which landmarks the segments of a sequence see, of those that lie behind each other level by level."""

    def __init__(self, landmarks: int, segments: int, window: Window, pyramid: Pyramid) -> None:
        self.window, self.pyramid = window, pyramid
        counts = pyramid.nodes(max(segments - window.segments, 0)) if landmarks else []
        if sum(counts) != landmarks:
            raise ValueError(f"{landmarks} landmarks, where {segments} segments have {counts} by level")
        self.starts = [sum(counts[:level]) for level in range(len(counts))]
        self.most = pyramid.seen(max(segments - window.segments, 0)) if landmarks else 0

    def parts(self, first: int, last: int) -> tuple[slice, ...]:
        """By level, the columns that segments ``first`` to ``last`` - 1 see among them. Bounds only grow."""
        if not self.starts:
            return ()
        back = self.window.segments
        high = self.pyramid.ranges(max(last - back, 0))
        low = self.pyramid.ranges(max(first + 1 - back, 0))
        firsts = [a for a, _ in low] + [0] * (len(high) - len(low))
        return tuple(slice(o + a, o + b) for o, a, (_, b) in zip(self.starts, firsts, high, strict=False))

    def hidden(self, tile: _Tile, device: torch.device) -> Tensor:
        """(count, visible) bool: the columns of a tile that a segment does not see."""
        segments = torch.arange(tile.first, tile.last, device=device)
        far = (segments - self.window.segments + 1).clamp(min=0)
        firsts, lasts = self.pyramid.columns(far, len(tile.far))
        out = torch.ones(tile.last - tile.first, tile.visible, dtype=torch.bool, device=device)
        at = 0
        for level, part in enumerate(tile.far):
            size, start = part.stop - part.start, self.starts[level]
            node = torch.arange(part.start - start, part.stop - start, device=device)
            out[:, at : at + size] = (node < firsts[level][:, None]) | (node >= lasts[level][:, None])
            at += size
        return out


def _tiles(q: Tensor, reach: _Reach) -> Iterator[_Tile]:
    """q: (B, S, c, d). Later segments come later for every head: the backward pass relies on it."""
    heads, segments, size, _ = q.shape
    columns = reach.most + reach.window.segments * size
    limit = _TILE_BYTES.get(device_type(q), _TILE_BYTES_GPU) // at_least_float32(q.dtype).itemsize
    most = max(1, limit // (size * columns))  # segments of one head that fill a tile
    few = -(-segments // _PARTS) if len(reach.starts) <= 1 else max(1, columns // _PYRAMID_PARTS)
    step = min(segments, most, max(few, most // heads))
    group = max(1, most // step)
    for first in range(0, segments, step):
        last = min(first + step, segments)
        far = reach.parts(first, last)
        visible = _round_up(sum(part.stop - part.start for part in far))
        for head in range(0, heads, group):
            yield _Tile(slice(head, min(head + group, heads)), first, last, far, visible)


def _round_up(count: int) -> int:
    return max(0, -(-count // _ALIGN) * _ALIGN)


class _Workspace:
    """Buffers by name and precision, as large as the largest tensor asked for so far."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: that of the inputs unless another one is given."""
        size, key = math.prod(shape), (name, dtype or self.like.dtype)
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers[key] = self.like.new_empty(size, dtype=key[1])
        return self.buffers[key][:size].view(shape)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        far_k: Tensor,
        far_v: Tensor,
        far_bias: Tensor,
        window: Window,
        pyramid: Pyramid,
        recall: int,
    ) -> Tensor:
        ctx.window, ctx.pyramid = window, pyramid
        q, k, v = (x.unflatten(1, (-1, window.segment_length)) for x in (q, k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        read = _Read(q, k, v, far_k, far_v, far_bias, window, pyramid)
        choice = Choice.empty(q, recall) if recall else None
        for tile in _tiles(q, read.reach):
            at = (tile.heads, slice(tile.first, tile.last))
            keys = read.columns(k, far_k, tile, "columns", read.operand)
            weights = read.weights(tile, read.queries(tile), keys, choice)
            rows = read.space("rows", *weights.shape[:2], q.shape[3])
            torch.bmm(weights, read.columns(v, far_v, tile, "columns"), out=rows)
            out[at] = rows.view(out[at].shape)
        if choice is not None:
            add_chosen(out, choice, q, k, v, read.space, read.operand)
        out = out.flatten(1, 2)
        ctx.save_for_backward(q, k, v, far_k, far_v, far_bias, *([] if choice is None else [*choice, out]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            q, k, v, far_k, far_v, far_bias, *chosen = ctx.saved_tensors
            read = _Read(q, k, v, far_k, far_v, far_bias, ctx.window, ctx.pyramid)
            grad = grad.to(q.dtype).unflatten(1, (-1, ctx.window.segment_length))
            recalled = None
            if chosen:
                segments, log_sum, out = chosen
                means = (grad.to(read.high) * out.view(grad.shape)).sum(dim=3)
                recalled = Recalled(Choice(segments, log_sum), means)
            d_q, d_k, d_v, *d_far = _backward(grad, read, recalled)
            if recalled is not None:
                add_gradients(grad, *recalled, q, k, v, (d_q, d_k, d_v), read.space, read.operand)
            return (*(x.flatten(1, 2) for x in (d_q, d_k, d_v)), *d_far, None, None, None)


class Recalled(NamedTuple):
    """What the backward pass needs to know where tokens read some segments exactly."""

    choice: Choice
    means: Tensor
    """(B, S, c): the product of each token's output with its gradient, in at least float32."""


class _Read:
    """The parts that forward and backward share. q, k, v: (B, S, c, d)."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        far_k: Tensor,
        far_v: Tensor,
        far_bias: Tensor,
        window: Window,
        pyramid: Pyramid,
    ) -> None:
        self.q, self.k, self.v, self.far_k, self.far_v, self.far_bias = q, k, v, far_k, far_v, far_bias
        self.window = window
        self.reach = _Reach(far_k.shape[1], q.shape[1], window, pyramid)
        self.back = window.segments - 1
        self.space = _Workspace(q)
        self.high = at_least_float32(q.dtype)
        # What logits are the product of. A GPU adds up products of 16-bit numbers in float32 and gives that back. A CPU
        # rounds the sums unless the operands are float32. In bfloat16 that makes an error of 1.4e-2 out of 1.6e-3 for
        # logits of deviation 20, and saves 20% of the time of the whole read, forward and backward (Zen 4).
        self.operand = q.dtype if device_type(q) == "cuda" else self.high
        size = window.segment_length
        like = q.new_empty(0, dtype=self.high)
        self.triangle = _minus_infinity_above(0, size, size, like)
        self.hidden: tuple[int, Tensor] | None = None

    def queries(self, tile: _Tile) -> Tensor:
        """A tile's queries, scaled, as an operand: (B' * count, c, d)."""
        part = self.q[tile.heads, tile.first : tile.last]
        out = self.space("queries", *part.shape, dtype=self.operand)
        return out.copy_(part).mul_(part.shape[3] ** -0.5).flatten(0, 1)

    def columns(self, x: Tensor, far: Tensor, tile: _Tile, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Keys or values of a tile: (B' * count, w c + visible, d), a segment's window and then the landmarks."""
        size, count, near = self.window.segment_length, tile.last - tile.first, self.window.segments * x.shape[2]
        heads = tile.heads.stop - tile.heads.start
        out = self.space(name, heads, count, near + tile.visible, x.shape[3], dtype=dtype)
        for i, (skip, source) in enumerate(self.windows(x, tile)):
            out[:, :skip, i * size : (i + 1) * size] = 0  # before the sequence's start
            out[:, skip:, i * size : (i + 1) * size] = source
        for part in tile.far:
            out[:, :, near : near + part.stop - part.start] = far[tile.heads, None, part]
            near += part.stop - part.start
        out[:, :, near:] = 0
        return out.flatten(0, 1)

    def far_logits(self, tile: _Tile) -> Tensor:
        """(B', count, 1, visible): what is added to the logits of a tile's landmarks, minus infinity where hidden."""
        if self.hidden is None or self.hidden[0] != tile.first:  # one for all heads
            self.hidden = (tile.first, self.reach.hidden(tile, self.q.device))
        bias = [self.far_bias[tile.heads, part] for part in tile.far]
        missing = tile.visible - sum(part.shape[1] for part in bias)
        row = F.pad(torch.cat(bias, dim=1), (0, missing)).unsqueeze(1)
        return row.masked_fill(self.hidden[1], -torch.inf).unsqueeze(2)

    def windows(self, x: Tensor, tile: _Tile) -> Iterator[tuple[int, Tensor]]:
        """For each of the w segments of a window, oldest first: how many of the tile's segments do not have it, and
        the view of x (B, S, c, d) that the others have."""
        for i in range(self.window.segments):
            first, last = tile.first - self.back + i, tile.last - self.back + i
            skip = min(max(-first, 0), tile.last - tile.first)
            yield skip, x[tile.heads, max(first + skip, 0) : max(last, 0)]

    def low(self, x: Tensor, name: str) -> Tensor:
        """``x`` in the precision of the inputs, in the workspace."""
        return x if x.dtype == self.q.dtype else self.space(name, *x.shape).copy_(x)

    def logits(self, q: Tensor, keys: Tensor) -> Tensor:
        """q (B, c, d) times keys (B, columns, d), both operands, in at least float32, in the workspace."""
        shape, keys = (q.shape[0], q.shape[1], keys.shape[1]), keys.transpose(1, 2)
        out = self.space("logits", *shape, dtype=self.high)
        if self.operand == self.high:
            return torch.bmm(q, keys, out=out)
        return torch.bmm(q, keys, out_dtype=self.high, out=out)

    def weights(
        self, tile: _Tile, q: Tensor, keys: Tensor, choice: Choice | None = None, *, again: bool = False
    ) -> Tensor:
        """(B' * count, c, w c + visible) softmax weights, in the workspace. With a ``choice`` they are those of all
        that was not chosen. The first time it is made here, and their sum is 1. ``again`` gives their share in the
        softmax over everything, in at least float32."""
        size, count = self.window.segment_length, tile.last - tile.first
        near, own = self.window.segments * size, self.back * size
        logits = self.logits(q, keys)
        logits[..., own:near] += self.triangle
        by_segment = logits.view(-1, count, size, keys.shape[1])
        for segment in range(tile.first, min(tile.last, self.back)):
            by_segment[:, segment - tile.first, :, : (self.back - segment) * size] = -torch.inf
        by_head = logits.view(tile.heads.stop - tile.heads.start, count, size, -1)
        far = by_head[..., near:]
        if tile.visible:
            far += self.far_logits(tile)
        weights = self.space("weights", *logits.shape, dtype=self.high)
        if choice is None:
            return self.low(torch.softmax(logits, 2, out=weights), "weights")
        at = (tile.heads, slice(tile.first, tile.last))
        if again:
            if tile.visible:
                hide(far, choice.segments[at])
            return choice.weigh_again(at, by_head, weights.view(by_head.shape)).view(logits.shape)
        choice.choose(at, far)
        return self.low(choice.weigh(at, by_head, weights.view(by_head.shape)).view(logits.shape), "weights")


def _backward(grad: Tensor, read: _Read, recalled: Recalled | None) -> tuple[Tensor, ...]:
    """Gradients of q, k, v (B, S, c, d), far_k, far_v and far_bias; landmarks' sums over tiles in at least float32.
    Those of segments that were read exactly are left out."""
    q, space, size = read.q, read.space, read.window.segment_length
    near = read.window.segments * size
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, read.k, read.v))
    d_bias = torch.zeros_like(read.far_bias)
    d_far_k, d_far_v = (torch.zeros_like(x, dtype=d_bias.dtype) for x in (read.far_k, read.far_v))

    for tile in _tiles(q, read.reach):
        at = (tile.heads, slice(tile.first, tile.last))
        part, d_out = read.queries(tile), grad[at].flatten(0, 1)
        keys = read.columns(read.k, read.far_k, tile, "columns", read.operand)
        wide = read.weights(tile, part, keys, None if recalled is None else recalled.choice, again=True)
        weights = read.low(wide, "weights")
        part, keys = read.low(part, "queries"), read.low(keys, "columns")

        def scatter(d_columns: Tensor, d_x: Tensor, d_far: Tensor, tile: _Tile = tile) -> None:
            d_columns = d_columns.view(tile.heads.stop - tile.heads.start, -1, *d_columns.shape[1:])
            # A segment's own tile comes first and writes, tiles that see it as an earlier segment come later and add.
            windows = list(enumerate(read.windows(d_x, tile)))
            for i, (skip, target) in reversed(windows):
                source = d_columns[:, skip:, i * size : (i + 1) * size]
                target.copy_(source) if i == read.back else target.add_(source)
            if tile.visible:
                add_by_level(d_far, _sum(d_columns[:, :, near:], (1,), d_far.dtype))

        def add_by_level(target: Tensor, x: Tensor, tile: _Tile = tile) -> None:
            at = 0
            for part in tile.far:
                target[tile.heads, part] += x[:, at : at + part.stop - part.start]
                at += part.stop - part.start

        d_columns = space("d_columns", *keys.shape)
        scatter(torch.bmm(weights.transpose(1, 2), d_out, out=d_columns), d_v, d_far_v)
        values = read.columns(read.v, read.far_v, tile, "values")
        d_weights = torch.bmm(d_out, values.transpose(1, 2), out=space("logits", *weights.shape))
        d_logits = space("d_logits", *weights.shape, dtype=None if recalled is None else read.high)
        if recalled is None:
            torch._softmax_backward_data(d_weights, weights, 2, weights.dtype, grad_input=d_logits)
        else:
            torch.sub(d_weights, recalled.means[at].flatten(0, 1).unsqueeze(2), out=d_logits).mul_(wide)
            d_logits = read.low(d_logits, "d_logits")
        rows = torch.bmm(d_logits, keys, out=space("rows", *part.shape))
        torch.mul(rows.view(d_q[at].shape), q.shape[3] ** -0.5, out=d_q[at])
        scatter(torch.bmm(d_logits.transpose(1, 2), part, out=d_columns), d_k, d_far_k)
        if tile.visible:
            by_segment = d_logits.view(tile.heads.stop - tile.heads.start, -1, *d_logits.shape[1:])
            add_by_level(d_bias, _sum(by_segment[..., near:], (1, 2), d_bias.dtype))
    return d_q, d_k, d_v, d_far_k.to(read.far_k.dtype), d_far_v.to(read.far_v.dtype), d_bias


def _sum(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The sum in ``dtype``. On a CPU PyTorch makes a copy in it: here it is made where the plan of memory sees it."""
    return x.to(dtype).sum(dims) if device_type(x) == "cpu" else x.sum(dims, dtype=dtype)


def _minus_infinity_above(diagonal: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """0 where column <= row + diagonal, minus infinity elsewhere."""
    return like.new_full((rows, columns), -torch.inf).triu_(diagonal + 1)
