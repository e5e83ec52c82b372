"""One text through the decoding cache, token by token, and the same tokens with a short context beside it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.shared.scoring import score
from eval.subject import Subject
from eval.tasks.language_modeling.windows import strided
from pretrain.model.attention.layout import Layout
from pretrain.model.decoding import DecodingCache, cache_bytes, decode, prefill

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TIMED = 512
"""Steps before a mark over which the time of a token is the median."""


@dataclass(frozen=True)
class Mark:
    """The state of a process that has read ``tokens`` tokens of its text."""

    tokens: int
    allocated_bytes: int
    """Of all tensors of the cache."""
    formula_bytes: int
    """Of a cache that is made for a text of just this length, by ``cache_bytes``."""
    exact_bytes: int
    """Of exact attention's cache for this length."""
    resident_bytes: int
    """Of the process, libraries and weights included."""
    step_ms: float
    """Median over the last steps."""

    @property
    def share(self) -> float:
        """Of exact attention's bytes that were allocated."""
        return self.allocated_bytes / self.exact_bytes


def allocated_bytes(cache: DecodingCache) -> int:
    """Bytes of all tensors that the layers keep, each storage whole."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in layer.tensors().values())


def stream(subject: Subject, tokens: Ints, marks: Sequence[int], steps: int | None = None) -> tuple[Floats, list[Mark]]:
    """Decode ``tokens`` (N + 1,): -log p in nats (N,) of each token but the first, and what there is at ``marks``.

    Caches are made for N tokens. With ``steps`` only so many tokens before each mark go in one by one, those before
    them by one forward pass into an empty cache. Where these are not predicted by any step, the loss is that of a
    forward pass over the whole text. None: the first token is the prompt, and all others are steps.
    """
    count = len(tokens) - 1
    most = count if steps is None else steps
    nats, found, read = np.zeros(count), [], 0
    if steps is not None:
        nats[:] = short_context(subject, tokens, count)
    cache, logits = None, torch.zeros(0)
    given = torch.from_numpy(tokens).to(subject.device)
    for mark in marks:
        if cache is None or mark - read > most:
            read = max(mark - most, 1)
            logits, cache = prefill(subject.model, given[None, :read], max_length=count)
            nats[read - 1] = _loss(logits, given, read)
        seconds = []
        while read < mark:
            began = time.perf_counter()
            logits = decode(subject.model, given[read : read + 1], cache)
            read += 1
            nats[read - 1] = _loss(logits, given, read)
            seconds.append(time.perf_counter() - began)
        found.append(_mark(subject, cache, mark, seconds[-TIMED:]))
        print(f"{mark:,} tokens: {found[-1].step_ms:.2f} ms a token", file=sys.stderr, flush=True)
    return nats, found


def _loss(logits: Tensor, given: Tensor, read: int) -> float:
    return torch.nn.functional.cross_entropy(logits.float(), given[read : read + 1]).item()


def _mark(subject: Subject, cache: DecodingCache, read: int, seconds: Sequence[float]) -> Mark:
    config, dtype = subject.model.config, next(subject.model.parameters()).dtype
    exact = config.model_copy(update={"attention": "softmax"})
    return Mark(
        read,
        allocated_bytes(cache),
        cache_bytes(config, 1, read, dtype),
        cache_bytes(exact, 1, read, dtype),
        psutil.Process().memory_info().rss,
        1000 * median(seconds),
    )


def short_context(subject: Subject, tokens: Ints, width: int) -> Floats:
    """-log p (N,) of the same tokens in windows of ``width`` that begin ``width / 2`` apart, by forward passes.

    A token has the last ``width / 2`` to ``width`` tokens before it as context, at the text's start all there are.
    Positions are counted from the window's start.
    """
    windows = strided(len(tokens) - 1, width, max(width // 2, 1), None)
    nats = np.zeros(len(tokens) - 1)
    for part in windows.parts():
        for chosen in windows.batches(part):
            starts, widths, scored = windows.starts[chosen], windows.widths[chosen], windows.scored[chosen]
            rows = torch.from_numpy(tokens[starts[:, None] + np.arange(int(widths[0]) + 1)])
            where = torch.zeros(rows.shape[0], rows.shape[1] - 1, dtype=torch.bool)
            where[:, -int(scored[0]) :] = True
            inputs, goals = rows[:, :-1], rows[:, 1:]
            found, _ = score(subject, inputs, where, goals[where], Layout.full(*inputs.shape))
            for start, width_, last, row in zip(starts, widths, scored, found.reshape(len(rows), -1), strict=True):
                nats[start + width_ - last : start + width_] = row
    return nats


def groups_of(edges: Sequence[int], values: Ints) -> list[tuple[int, int, NDArray[np.bool_]]]:
    """(low, high, which) for each two neighbouring ``edges``: values above low and up to high."""
    return [(low, high, (values > low) & (values <= high)) for low, high in pairwise(edges)]


def since_last(tokens: Ints) -> Ints:
    """(N,): how many tokens before each of ``tokens[1:]`` the same one last occurred; 0 for never."""
    order = np.argsort(tokens, kind="stable")
    again = tokens[order[1:]] == tokens[order[:-1]]
    found = np.zeros(len(tokens), dtype=np.int64)
    found[order[1:][again]] = (order[1:] - order[:-1])[again]
    return found[1:]
