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
    step_ms: float | None
    """Median over the last steps; None within the prompt, which takes none."""

    @property
    def share(self) -> float:
        """Of exact attention's bytes that were allocated."""
        return self.allocated_bytes / self.exact_bytes


def allocated_bytes(cache: DecodingCache) -> int:
    """Bytes of all tensors that the layers keep, each storage whole."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in layer.tensors().values())


def stream(subject: Subject, tokens: Ints, marks: Sequence[int], prompt: int = 1) -> tuple[Floats, list[Mark]]:
    """Decode ``tokens`` (N + 1,): -log p in nats (N,) of each token but the first, and what there is at ``marks``.

    The cache is made once, for N tokens. The first ``prompt`` tokens go in by one forward pass, each other one as a
    step. The losses within the prompt are those of another forward pass.
    """
    model, count = subject.model, len(tokens) - 1
    wanted, began = set(marks), time.perf_counter()
    nats, seconds = np.zeros(count), np.zeros(count)
    given = torch.from_numpy(tokens).to(subject.device)
    if prompt > 1:
        nats[: prompt - 1] = short_context(subject, tokens[:prompt], prompt)
        began = time.perf_counter()
    logits, cache = prefill(model, given[None, :prompt], max_length=count)
    found = [_mark(subject, cache, mark, None) for mark in marks if mark < prompt]
    for read in range(prompt, count + 1):
        if read > prompt:
            began = time.perf_counter()
            logits = decode(model, given[read - 1 : read], cache)
        nats[read - 1] = torch.nn.functional.cross_entropy(logits.float(), given[read : read + 1]).item()
        seconds[read - 1] = time.perf_counter() - began
        if read in wanted:
            last = seconds[max(read - TIMED, prompt) : read].tolist()
            found.append(_mark(subject, cache, read, 1000 * median(last) if last else None))
            print(f"{read:,} tokens: loss {nats[:read].mean():.4f}, {_spent(found[-1])}", file=sys.stderr, flush=True)
    return nats, found


def _mark(subject: Subject, cache: DecodingCache, read: int, step_ms: float | None) -> Mark:
    config, dtype = subject.model.config, next(subject.model.parameters()).dtype
    exact = config.model_copy(update={"attention": "softmax"})
    return Mark(
        read,
        allocated_bytes(cache),
        cache_bytes(config, 1, read, dtype),
        cache_bytes(exact, 1, read, dtype),
        psutil.Process().memory_info().rss,
        step_ms,
    )


def _spent(mark: Mark) -> str:
    return "in the prompt" if mark.step_ms is None else f"{mark.step_ms:.2f} ms a token"


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
