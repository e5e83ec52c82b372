"""A pyramid of landmarks: fine ones near, and farther back ones that each stand for several of them.

Flat landmarks make causal attention read n / c entries for its last token. Here r neighbouring landmarks have a parent,
r parents have one again, and a token reads about b entries of each level: O(b log n) of them.

The parent. Its query q~ is the mean of its children's, and with logits taken there, s = d^-1/2,

    pi = softmax_i(s q~.k_i + M_i),    k = sum pi_i k_i,    v = sum pi_i v_i,    M = sum pi_i M_i + H(pi)

with H the entropy. By the chain rule of entropy that is a tangent again, over the *tokens* of all children: with
r_t = pi_i p_t it has k = sum r_t k_t and M = H(r). So at any depth, for every query q,

    logsumexp over all its tokens of s q.k_t  >=  s q.k + M

and a node never weighs more than its tokens. It is exact at q~ only if the children were made with the same query.

What a token sees. Let e_0 be the number of segments before its window, and

    e_(l+1) = r^(l+1) floor(max(0, e_l - b r^l) / r^(l+1))

Of level l it sees the nodes of segments e_(l+1) to e_l: at least b of them and fewer than b + r. The last level that is
allowed covers what is left. The list follows from the number of the segment alone and never from the length of the row.
A prefix therefore sees the same, and a node is seen only after all of its tokens: nothing leaks. The bounds grow
with e_0 and only once in r^l segments, so neighbouring segments see almost the same nodes, which lie side by side.

Where it comes from. Coarser summaries farther back are those of H-Transformer-1D (Zhu and Soricut 2021, arXiv
2107.11906), fast multipole attention (Kang et al. 2023, arXiv 2310.11960), MuSe (2025, arXiv 2509.10406) and log-linear
attention (Guo et al. 2025, arXiv 2506.04761). The parent as a tangent of tangents, with its bound, and one softmax over
all levels are this project's own, as far as we know.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Pyramid(NamedTuple):
    """How landmarks thin out with distance; all numbers are those of a model and never of a row."""

    levels: int = 1
    """At most so many; 1: every landmark is seen as it is."""
    band: int = 16
    """b, nodes of a level that are seen at least, before the next level begins."""
    branching: int = 2
    """r, nodes that a parent stands for."""

    def edges(self, far: int) -> list[int]:
        """[e_0, e_1, ..., 0] for a token with e_0 = ``far`` segments before its window: level l is seen from segment
        ``edges[l + 1]`` to ``edges[l]``. No levels, ``[0]``, for none."""
        found = [far]
        while found[-1] > 0:
            span = self.branching ** (len(found) - 1)  # segments that a node of this level stands for
            beyond = max(0, found[-1] - self.band * span) if len(found) < self.levels else 0
            found.append(beyond // (span * self.branching) * span * self.branching)
        return found

    def nodes(self, far: int) -> list[int]:
        """How many nodes of each level the tokens with up to ``far`` segments before their window see, from 0 on."""
        return [edge // self.branching**level for level, edge in enumerate(self.edges(far)[:-1])]

    def ranges(self, far: int) -> list[tuple[int, int]]:
        """The nodes seen of each level, [first, last), numbered within the level."""
        edges = self.edges(far)
        return [
            (low // self.branching**level, high // self.branching**level)
            for level, (high, low) in enumerate(pairwise(edges))
        ]

    def seen(self, far: int) -> int:
        """Entries that a token reads beyond its window."""
        return sum(high - low for low, high in self.ranges(far))

    def columns(self, far: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """:meth:`ranges` for many tokens: int64 (...,) -> first and last, (``depth``, ...), equal where a level is not
        seen."""
        firsts, lasts, edge = [], [], far
        for level in range(depth):
            span = self.branching**level
            beyond = torch.zeros_like(edge)
            if level + 1 < min(self.levels, depth):
                step = span * self.branching
                beyond = (edge - self.band * span).clamp(min=0) // step * step
            firsts.append(beyond // span)
            lasts.append(edge // span)
            edge = beyond
        return torch.stack(firsts), torch.stack(lasts)


FLAT = Pyramid()
"""Every segment has its own landmark, however far it is."""


class Level(NamedTuple):
    """Nodes of one level, n for each of B heads of all rows."""

    queries: Tensor
    """(B, n, d), q~."""
    keys: Tensor
    """(B, n, d)."""
    mass: Tensor
    """(B, n), M."""
    values: Tensor
    """(B, n, d)."""


def parents(children: Level, branching: int, *, weighted: bool = True) -> Level:
    """One node for each ``branching`` neighbouring ones, (B, n * r, ...) -> (B, n, ...).

    ``weighted``: keys are weighted as the values are. Otherwise they are plain means, and M makes the logit exact at q~
    where the children's are.
    """
    queries, keys, mass, values = (x.unflatten(1, (-1, branching)) for x in children)
    return merge(queries.mean(dim=2), keys, mass, values, weighted=weighted)


def merge(query: Tensor, keys: Tensor, mass: Tensor, values: Tensor, *, weighted: bool = True) -> Level:
    """The parents of entries (..., r, d) and (..., r), by queries (..., d); see :func:`parents`."""
    scale = query.shape[-1] ** -0.5
    logits = scale * (keys @ query.unsqueeze(-1)).squeeze(-1) + mass
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    row = p.unsqueeze(-2)
    value = (row @ values).squeeze(-2)
    if weighted:
        return Level(query, (row @ keys).squeeze(-2), (p * (mass - log_p)).sum(dim=-1), value)
    key = keys.mean(dim=-2)
    return Level(query, key, logits.logsumexp(dim=-1) - scale * (query * key).sum(dim=-1), value)


def all_levels(landmarks: Level, pyramid: Pyramid, *, weighted: bool = True) -> list[Level]:
    """What tokens with up to n segments before their window see, level by level, of n ``landmarks``."""
    counts = pyramid.nodes(landmarks.keys.shape[1])
    levels = [landmarks]
    for count in counts[1:]:
        children = Level(*(x[:, : count * pyramid.branching] for x in levels[-1]))
        levels.append(parents(children, pyramid.branching, weighted=weighted))
    return levels
