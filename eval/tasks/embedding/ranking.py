"""How well right documents are ranked: MRR, recall and nDCG, of ties their expected value.

Equal similarities leave open which document comes first. Any order that a sort happens to give would be luck: each
figure is the mean over all orders of the equal ones (McSherry and Najork 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CUT = 10
RECALLS = (1, 5, 10)
NDCG = f"ndcg@{CUT}"
MEASURES = (NDCG, f"mrr@{CUT}", *(f"recall@{k}" for k in RECALLS))
_GAINS = 1 / np.log2(np.arange(2, CUT + 2))  # of a right document at places 1 to CUT


def measures(similarity: Any, right: Sequence[int]) -> dict[str, float]:
    """The measures of one query. ``similarity``: (D,) of all documents; ``right``: the places of the right ones.

    ``rank`` is the expected place of the first right one, from 1.
    """
    similarity = np.asarray(similarity)
    of_right = similarity[list(right)]
    found = dict.fromkeys(MEASURES, 0.0)
    for place, value in enumerate(sorted(set(of_right.tolist()), reverse=True)):
        above, tied = int((similarity > value).sum()), int((similarity == value).sum())
        hits = int((of_right == value).sum())
        found[NDCG] += hits / tied * float(_GAINS[above : above + tied].sum())
        for k in RECALLS:
            found[f"recall@{k}"] += hits / tied * min(max(k - above, 0), tied) / len(of_right)
        if place == 0:
            found["rank"] = above + (tied + 1) / (hits + 1)
            found[f"mrr@{CUT}"] = _reciprocal(above, tied, hits)
    found[NDCG] /= float(_GAINS[: len(of_right)].sum())
    return found


def chance(documents: int, right: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """The measures of each query where all documents are equally similar: a random order."""
    return [measures(np.zeros(documents), places) for places in right]


def _reciprocal(above: int, tied: int, hits: int) -> float:
    """Expected 1 / place of the first of ``hits`` right ones among ``tied`` equal ones behind ``above`` others, 0
    beyond place ``CUT``."""
    total, first_here = 0.0, hits / tied
    for number in range(1, min(CUT - above, tied - hits + 1) + 1):
        total += first_here / (above + number)
        if tied > number:
            first_here *= (tied - number - hits + 1) / (tied - number)
    return total
