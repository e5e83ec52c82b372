"""Exact recall: the far segments that a token asks for most, read token by token in the same softmax.

A landmark holds one key and one value, so facts within a segment are hard to tell apart. Here each token chooses, for
each head, the k far segments whose landmarks have the largest logits ``s q.k~ + M`` for its own query. Their c tokens
take the place of these landmarks; all other landmarks stay. With s = d^-1/2 and C the choice,

    weights = softmax over [tokens of the window, landmarks not in C, tokens of the segments in C]

The bound of the landmarks survives and gets tighter: a landmark never weighs more than its tokens, so far text weighs
at least what it does through landmarks alone, and at most what it does in exact attention. With k far segments or
fewer it is exact attention. The choice is a token's own and reads nothing later than that token: a choice that a whole
segment shared would look at later tokens' queries. Of equal logits the oldest segment's is chosen. No gradient flows
through the choice; all logits in the softmax have theirs.

How it is read. To gather k c keys for each token would cost O(n k c d) memory, and would use no key twice. Instead the
n k pairs of a token and a segment are sorted by segment, as a mixture of experts sorts its tokens, and cut into blocks
of queries of one segment. A block is a small product with that segment's keys. It gives each pair an output and a
logsumexp, which are merged with those of the rest. The backward pass makes the weights again from the logsumexp of
everything, as FlashAttention does. Memory is linear in n; that of pairs is only held for some heads at a time.

Where it comes from. Chosen blocks are read exactly in Landmark attention (Mohtashami and Jaggi 2023, arXiv 2305.16300),
NSA (Yuan et al. 2025, arXiv 2502.11089) and HiLS-Attention (2026, arXiv 2607.02980), whose landmarks are ours and which
drops what it does not choose. Here the choice is each token's own, and all mass stays in one softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.compute import at_least_float32, device_type

Space = Callable[..., Tensor]
"""Named buffers: ``space(name, *shape, dtype=...)``."""
Place = tuple[slice, slice]
"""Some heads, and some segments of queries."""

_PAIR_BYTES = {"cpu": 2**24}
"""Outputs of pairs that are held at a time, unless those of a single head are more. A CPU uses that memory again for
the next heads, a GPU wants few launches."""
_PAIR_BYTES_GPU = 2**28
_SLAB_BYTES = {"cpu": 2**19}
"""Logits of the blocks that are computed at a time."""
_SLAB_BYTES_GPU = 2**27
_MOST_QUERIES = 64
"""Of a block, which has about half as many as a segment is chosen by: more make a larger product and leave more of it
empty. With 128 the whole of attention takes 5% longer at n = 16k, k = 2, and as long with 32."""


class Choice(NamedTuple):
    """What the tokens of B heads chose, S segments of c tokens; and what their softmaxes add up to."""

    segments: Tensor
    """(B, S, c, k) int32: numbers of segments; -1 where a token has fewer than k far ones."""
    log_sum: Tensor
    """(B, S, c): the logsumexp of a token's logits, in at least float32."""

    @classmethod
    def empty(cls, q: Tensor, count: int) -> Choice:
        """Room for the choice of ``count`` segments by queries (B, S, c, d)."""
        segments = q.new_empty(*q.shape[:3], count, dtype=torch.int32)
        return cls(segments, q.new_empty(q.shape[:3], dtype=at_least_float32(q.dtype)))

    def choose(self, at: Place, far: Tensor) -> None:
        """From logits of landmarks (B', S', c, m), of which the chosen ones become minus infinity."""
        if not far.shape[3]:
            self.segments[at] = -1
            return
        for slot in range(self.segments.shape[3]):
            best, column = far.max(dim=3)  # of equal ones the first, which topk does not promise
            self.segments[at][..., slot] = column.masked_fill_(best == -torch.inf, -1)
            hide(far, self.segments[at][..., slot : slot + 1])

    def weigh(self, at: Place, logits: Tensor, out: Tensor) -> Tensor:
        """The softmax of logits (B', S', c, columns), and its logsumexp noted."""
        weights = torch.softmax(logits, 3, out=out)
        # Two passes that find a maximum: a logsumexp would take as long again as the softmax.
        torch.sub(logits.amax(dim=3), weights.amax(dim=3).log(), out=self.log_sum[at])
        return weights

    def weigh_again(self, at: Place, logits: Tensor, out: Tensor) -> Tensor:
        """The share of these logits in the whole softmax."""
        return torch.sub(logits, self.log_sum[at].unsqueeze(3), out=out).exp_()


def hide(far: Tensor, segments: Tensor) -> None:
    """Minus infinity for the landmarks (..., m) of chosen ``segments`` (..., k). -1 stands for the first column: where
    a token has too few far segments, that one is chosen or is not seen."""
    far.scatter_(3, segments.long().clamp_(min=0), -torch.inf)


class _Blocks(NamedTuple):
    """Pairs of a token and a segment that it chose, by segment, in blocks of b slots; numbers of tokens and segments
    run on over some heads. The number of blocks is that of the worst case, which follows from shapes alone."""

    segment: Tensor
    """(blocks,) int64: which one a block's queries read."""
    token: Tensor
    """(blocks, b) int64: whose query is in a slot."""
    empty: Tensor
    """(blocks, b) bool: nobody's, and any token stands there."""
    slot: Tensor
    """(tokens, k) int64: where each token's pairs went; one behind the last for none."""

    @classmethod
    def of(cls, chosen: Tensor, segments: int) -> _Blocks:
        """chosen: (B, n, k) int32, of ``segments`` segments in each head."""
        heads, length, count = chosen.shape
        pairs, total = chosen.numel(), heads * segments
        size = min(_MOST_QUERIES, _power_of_two(pairs // (2 * total)))
        blocks = pairs // size + total
        first = torch.arange(heads, device=chosen.device, dtype=chosen.dtype)[:, None, None] * segments
        key, order = torch.where(chosen < 0, total, chosen + first).flatten().sort(stable=True)
        starts = torch.searchsorted(key, torch.arange(total + 1, device=key.device, dtype=key.dtype))
        ends = ((starts.diff() + size - 1) // size).cumsum(0)  # blocks up to a segment's last one
        number = torch.arange(pairs, device=key.device)
        own = key.clamp(max=total - 1).long()
        before = F.pad(ends, (1, 0))[own] * size
        at = torch.where(key < total, before + number - starts[own], blocks * size)
        token = torch.full((blocks * size + 1,), -1, device=key.device)
        token[at] = order // count
        token = token[:-1].view(blocks, size)
        slot = torch.empty_like(at)
        slot[order] = at
        segment = torch.searchsorted(ends, torch.arange(blocks, device=key.device), right=True)
        empty = token < 0
        return cls(segment.clamp(max=total - 1), token.clamp(min=0), empty, slot.view(heads * length, count))

    def slabs(self, limit: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """``limit`` blocks at a time: their slots, and their part of ``segment``, ``token`` and ``empty``."""
        blocks, size = self.token.shape
        for first in range(0, blocks, limit):
            part = slice(first, min(first + limit, blocks))
            yield slice(part.start * size, part.stop * size), self.segment[part], self.token[part], self.empty[part]


def _power_of_two(x: int) -> int:
    return 1 << max(x, 1).bit_length() - 1


class _Pairs:
    """The products of some heads' pairs, a slab at a time. q, k, v: (B', S, c, d)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, space: Space, operand: torch.dtype) -> None:
        self.q = q.reshape(-1, q.shape[3])
        self.k, self.v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        self.space, self.operand, self.high = space, operand, at_least_float32(q.dtype)
        self.blocks = _Blocks.of(chosen.flatten(1, 2), q.shape[1])
        size, itemsize = self.blocks.token.shape[1] * k.shape[2], self.high.itemsize
        self.limit = max(1, _SLAB_BYTES.get(device_type(q), _SLAB_BYTES_GPU) // (size * itemsize))

    def rows(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A row for each slot, and one of zeros behind them."""
        out = self.space(name, self.blocks.token.numel() + 1, self.q.shape[1], dtype=dtype)
        out[-1] = 0
        return out

    def take(self, x: Tensor, index: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """x[index], in the workspace."""
        out = self.space(name, *index.shape, *x.shape[1:])
        torch.index_select(x, 0, index.flatten(), out=out.flatten(0, index.dim() - 1))
        return out if dtype in (None, x.dtype) else self.space(f"{name}, wide", *out.shape, dtype=dtype).copy_(out)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        shape = (*q.shape[:2], k.shape[1])
        out = self.space("pair logits", *shape, dtype=self.high)
        if self.operand == self.high:
            return torch.bmm(q, k.transpose(1, 2), out=out)
        return torch.bmm(q, k.transpose(1, 2), out_dtype=self.high, out=out)

    def low(self, x: Tensor, name: str) -> Tensor:
        return x if x.dtype == self.q.dtype else self.space(name, *x.shape).copy_(x)

    def sum(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Each token's sum over its pairs' rows: (tokens, d)."""
        weights = None if weights is None else weights.to(rows.dtype)
        return F.embedding_bag(self.blocks.slot, rows, per_sample_weights=weights, mode="sum")


def _add_at(target: Tensor, index: Tensor, x: Tensor) -> None:
    """Add x to target[index], where an index comes several times. On a GPU ``index_add_`` adds in any order, and the
    other one always in the same."""
    if device_type(target) == "cpu":
        target.index_add_(0, index, x.to(target.dtype))
    else:
        target.index_put_((index,), x.to(target.dtype), accumulate=True)


def _heads(q: Tensor, count: int) -> Iterator[slice]:
    """q: (B, S, c, d)."""
    limit = _PAIR_BYTES.get(device_type(q), _PAIR_BYTES_GPU) // q.dtype.itemsize
    step = max(1, limit // (q.shape[1:].numel() * count))
    for first in range(0, len(q), step):
        yield slice(first, min(first + step, len(q)))


def add_chosen(
    out: Tensor, choice: Choice, q: Tensor, k: Tensor, v: Tensor, space: Space, operand: torch.dtype
) -> None:
    """Put the tokens of chosen segments into ``out`` (B, S, c, d) and ``choice.log_sum``, which hold the softmax over
    all the rest. ``operand``: what logits are the product of."""
    scale, high = q.shape[3] ** -0.5, at_least_float32(q.dtype)
    for heads in _heads(q, choice.segments.shape[3]):
        pairs = _Pairs(q[heads], k[heads], v[heads], choice.segments[heads], space, operand)
        outputs = pairs.rows("pair outputs")
        sums = space("pair sums", len(outputs), dtype=high)
        sums[-1] = -torch.inf
        for slots, segment, token, _ in pairs.blocks.slabs(pairs.limit):
            queries = pairs.take(pairs.q, token, "pair queries", operand).mul_(scale)
            logits = pairs.logits(queries, pairs.take(pairs.k, segment, "pair keys", operand))
            weights = torch.softmax(logits, 2, out=space("pair weights", *logits.shape, dtype=high))
            torch.sub(logits.amax(dim=2), weights.amax(dim=2).log(), out=sums[slots].view(token.shape))
            values = pairs.take(pairs.v, segment, "pair values")
            torch.bmm(pairs.low(weights, "pair weights"), values, out=outputs[slots].view(*token.shape, -1))
        before = choice.log_sum[heads].flatten()
        own = sums[pairs.blocks.slot]
        total = torch.logaddexp(own.logsumexp(dim=1), before)
        shares = (own - total.unsqueeze(1)).exp_()
        kept = (before - total).exp_().view(*out[heads].shape[:3], 1)
        out[heads] = out[heads] * kept + pairs.sum(outputs, shares).view(out[heads].shape)
        choice.log_sum[heads] = total.view(choice.log_sum[heads].shape)


def add_gradients(
    grad: Tensor,
    choice: Choice,
    means: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    space: Space,
    operand: torch.dtype,
) -> None:
    """Add what chosen tokens give to the ``gradients`` of q, k and v. grad: of the output, (B, S, c, d). means: (B, S,
    c), the products of an output with its gradient."""
    scale, high = q.shape[3] ** -0.5, at_least_float32(q.dtype)
    d_q, d_k, d_v = gradients
    for heads in _heads(q, choice.segments.shape[3]):
        pairs = _Pairs(q[heads], k[heads], v[heads], choice.segments[heads], space, operand)
        d_rows, d_out = pairs.rows("pair outputs"), grad[heads].reshape(-1, grad.shape[3])
        total, mean = choice.log_sum[heads].flatten(), means[heads].flatten()
        of_k, of_v = (x.new_zeros(x.shape, dtype=high) for x in (pairs.k, pairs.v))
        for slots, segment, token, empty in pairs.blocks.slabs(pairs.limit):
            queries = pairs.take(pairs.q, token, "pair queries", operand).mul_(scale)
            keys = pairs.take(pairs.k, segment, "pair keys", operand)
            weights = pairs.logits(queries, keys).sub_(total[token].masked_fill_(empty, torch.inf).unsqueeze(2)).exp_()
            queries, keys = pairs.low(queries, "pair queries"), pairs.low(keys, "pair keys")
            asked = pairs.take(d_out, token, "pair gradients")
            low = pairs.low(weights, "pair weights")
            product = torch.bmm(low.transpose(1, 2), asked, out=space("pair sums of rows", *keys.shape))
            _add_at(of_v, segment, product)
            values = pairs.take(pairs.v, segment, "pair values")
            d_weights = torch.bmm(asked, values.transpose(1, 2), out=space("pair d weights", *low.shape))
            d_logits = space("pair d logits", *low.shape, dtype=high)
            torch.sub(d_weights, mean[token].unsqueeze(2), out=d_logits).mul_(weights)
            d_low = pairs.low(d_logits, "pair d logits")
            torch.bmm(d_low, keys, out=d_rows[slots].view(*token.shape, -1))
            torch.bmm(d_low.transpose(1, 2), queries, out=product)
            _add_at(of_k, segment, product)
        d_q[heads] += scale * pairs.sum(d_rows).view(d_q[heads].shape)
        d_k[heads] += of_k.view(d_k[heads].shape)
        d_v[heads] += of_v.view(d_v[heads].shape)


def choose_tokens(far: Tensor, count: int, segment_length: int) -> tuple[Tensor, Tensor]:
    """One more token for each row: which past ones it reads, by logits (B, H, m) of landmarks, of which the chosen
    become minus infinity. Returns the tokens' numbers and whether they are seen, both (B, H, k c), with k = ``count``
    or as many landmarks as there are."""
    chosen = []
    for _ in range(min(count, far.shape[2])):
        best, segment = far.max(dim=2, keepdim=True)
        chosen.append(torch.where(best == -torch.inf, -1, segment))
        far.scatter_(2, segment, -torch.inf)
    segments = torch.cat(chosen, dim=2).unsqueeze(3)
    tokens = segments.clamp(min=0) * segment_length + torch.arange(segment_length, device=far.device)
    return tokens.flatten(2), (segments >= 0).expand_as(tokens).flatten(2)
