"""MRR, recall and nDCG of a ranking, of ties the mean over all orders."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from eval.tasks.embedding.ranking import CUT, MEASURES, chance, measures


def of_order(order: list[int], right: list[int]) -> dict[str, float]:
    """The measures of one order of the documents, by their definitions."""
    places = sorted(order.index(document) + 1 for document in right)
    gain = sum(1 / np.log2(place + 1) for place in places if place <= 10)
    ideal = sum(1 / np.log2(place + 1) for place in range(1, min(len(right), 10) + 1))
    recalls = {f"recall@{k}": sum(place <= k for place in places) / len(right) for k in (1, 5, 10)}
    reciprocal = 1 / places[0] if places[0] <= 10 else 0.0
    return {"ndcg@10": gain / ideal, "mrr@10": reciprocal, **recalls, "rank": places[0]}


@pytest.mark.parametrize("right", [[2], [0, 4], [1, 2, 5]])
@pytest.mark.parametrize("similarity", [[3, 1, 2, 0, 5, 4], [1, 1, 1, 0, 1, 2], [0] * 6, [2, 2, 1, 1, 0, 0]])
def test_ties_count_as_the_mean_over_their_orders(similarity: list[int], right: list[int]) -> None:
    sorted_orders = [
        of_order(list(order), right)
        for order in permutations(range(6))
        if all(similarity[a] >= similarity[b] for a, b in pairwise(order))
    ]
    found = measures(np.array(similarity, dtype=float), right)
    assert set(found) == {*MEASURES, "rank"}
    for name, value in found.items():
        assert value == pytest.approx(np.mean([order[name] for order in sorted_orders])), name


def test_places_beyond_the_tenth_count_for_nothing_but_the_rank() -> None:
    similarity = np.arange(20.0)
    assert measures(similarity, [9]) == dict.fromkeys(MEASURES, 0.0) | {"rank": 11.0}
    tenth = measures(similarity, [10])
    assert (tenth["mrr@10"], tenth["recall@10"], tenth["recall@5"]) == (0.1, 1.0, 0.0)
    # Of 20 documents in a random order each place is as likely.
    by_chance = chance(20, [[3]])[0]
    assert by_chance["mrr@10"] == pytest.approx(sum(1 / place for place in range(1, 11)) / 20)
    assert by_chance["recall@5"] == 0.25
    assert by_chance["rank"] == 10.5
    # Ties that reach over the tenth place.
    tied = measures(np.array([2.0] * 8 + [1.0] * 6), [8])
    assert tied["recall@10"] == pytest.approx(2 / 6)
    assert tied["mrr@10"] == pytest.approx((1 / 9 + 1 / 10) / 6)


def test_ndcg_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        similarity = rng.integers(0, 12, 40).astype(float)  # many ties
        right = sorted(rng.choice(40, rng.integers(1, 15), replace=False).tolist())
        truth = np.zeros((1, 40))
        truth[0, right] = 1
        expected = ndcg_score(truth, similarity[None], k=CUT, ignore_ties=False)
        assert measures(similarity, right)["ndcg@10"] == pytest.approx(expected)
