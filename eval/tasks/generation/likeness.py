"""Likeness of a set of texts to real text, from vectors that stand for the texts: coherence and MAUVE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

# At 100 held-out passages of 64 tokens, 5.3M parameters, real text scores 0.97 against other real text whatever the
# vectors. Its shuffled tokens score 0.19 with the states of a masked model, and 0.95 with those of a causal one. With
# fewer there are so few clusters that all is alike.
MAUVE_LEAST = 100
# "A few thousand", the README of mauve-text says; Pillutla et al. 2021 use 5000.
MAUVE_ADVISED = 1000
MAUVE_SEEDS = 5
INSTALL = "pip install 'nystrom-pretrain[mauve]'"

Floats = NDArray[np.float64]


def mauve_problem(smallest: int) -> str | None:
    """Why MAUVE is not computed where the smallest of the sets has so many texts, or None."""
    if smallest < MAUVE_LEAST:
        return f"MAUVE is not computed for fewer than {MAUVE_LEAST} texts: raise --num-samples."
    if find_spec("mauve") is None or find_spec("faiss") is None:
        return f"MAUVE needs mauve-text: {INSTALL}."
    return None


def mauve(texts: Floats, real: Floats, seed: int = 0) -> tuple[float, float]:
    """MAUVE (Pillutla et al. 2021) of two sets of vectors, (n, d) and (m, d): 1 if they are distributed alike.

    The area under the divergence curve of the two histograms over clusters, a tenth as many as texts, by mauve-text.
    Returns mean and sample standard deviation over :data:`MAUVE_SEEDS` clusterings, which start at random.
    """
    from mauve import compute_mauve

    with _without_warnings():
        values = [
            float(compute_mauve(texts, real, seed=seed + i, kmeans_num_redo=1, verbose=False).mauve)
            for i in range(MAUVE_SEEDS)
        ]
    return float(np.mean(values)), float(np.std(values, ddof=1))


def cosines(first: Floats, second: Floats) -> Floats:
    """Cosine of each pair of rows, (n,); vectors of length zero have 0 with all others."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.where(norms > 0, norms, 1)


def others(count: int) -> NDArray[np.int64]:
    """For each of ``count`` texts another one, half of them away: neighbours often come from one document. A single
    one has itself, for there is no other."""
    return (np.arange(count) + max(count // 2, 1)) % max(count, 1)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """faiss writes to the process's standard error, for every clustering, that 39 points a cluster would be better;
    MAUVE's own rule gives it 20."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
