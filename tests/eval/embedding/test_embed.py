"""Vectors of texts: what they depend on and what not, centring, TF-IDF, cosines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from suites_case import WORDS, subject_of

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.shared.pooling import Pooling
from eval.tasks.embedding.embed import (
    as_tokens,
    centred,
    cosines,
    embed,
    network_of,
    normalised,
    paired_cosines,
    tfidf,
)

TEXTS = ["river", "stone cloud lamp " * 9, "quiet seven", "river", "window paper ghost violin orange " * 3]


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_and_other_texts_do_not_change_a_vector(
    kind: str, pooling: Pooling, request: pytest.FixtureRequest, shards: ShardSet
) -> None:
    subject = subject_of(request.getfixturevalue(kind), shards)
    tokens = as_tokens(shards.tokenizer(), TEXTS, 64, "file").tokens
    done: list[int] = []
    together = embed(subject.model, tokens, pooling, micro_tokens=10**6, pad_id=0, on_batch=done.append)
    assert done == [4]  # a copy is not computed again
    assert (together[0] == together[3]).all()
    other_padding = embed(subject.model, tokens, pooling, micro_tokens=10**6, pad_id=7)
    np.testing.assert_array_equal(other_padding, together)
    for row, ids in zip(together, tokens, strict=True):
        # 9e-7 at most between one text alone and five of other lengths
        np.testing.assert_allclose(embed(subject.model, [ids], pooling, micro_tokens=1, pad_id=0)[0], row, atol=1e-5)
        states = subject.model(torch.tensor([ids]), hidden=True).hidden[0].detach().numpy()
        np.testing.assert_allclose(states.mean(0) if pooling == "mean" else states[-1], row, atol=1e-5)
    order = [3, 1, 4, 2, 0]
    shuffled = embed(subject.model, [tokens[i] for i in order], pooling, micro_tokens=40, pad_id=0)
    np.testing.assert_allclose(shuffled, together[order], atol=1e-5)


def test_random_networks_are_a_function_of_their_seed(masked: Path, shards: ShardSet) -> None:
    subject = subject_of(masked, shards)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights = [network_of(subject, seed).layers[0].attention.query.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert network_of(subject, None) is subject.model


def test_cut_texts_and_texts_without_tokens(shards: ShardSet) -> None:
    tokenizer = shards.tokenizer()
    found = as_tokens(tokenizer, TEXTS, 6, "file")
    whole = [tokenizer.encode(text) for text in TEXTS]
    assert found.tokens == [list(ids[:6]) for ids in whole]
    assert found.lengths.tolist() == [len(ids) for ids in whole]
    assert found.cut.tolist() == [len(ids) > 6 for ids in whole]
    assert TEXTS[1].startswith(found.read(tokenizer)[1].strip())
    with pytest.raises(UserError, match="file: the text '' has no token: leave its record out"):
        as_tokens(tokenizer, ["river", ""], 6, "file")


def test_damaged_weights_are_named(masked: Path, shards: ShardSet) -> None:
    subject = subject_of(masked, shards)
    with torch.no_grad():
        next(subject.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        embed(subject.model, [[5, 6]], "mean", micro_tokens=9, pad_id=0)


def test_centring_takes_out_what_all_share() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 8))
    shared = vectors + 100 * rng.normal(size=8)
    assert cosines(normalised(shared), normalised(shared)).min() > 0.99
    np.testing.assert_allclose(
        cosines(normalised(centred(shared)), normalised(centred(shared))),
        cosine_similarity(vectors - vectors.mean(0)),
        atol=1e-8,
    )
    # Where all vectors are one, what is left is nothing, not its rounding: cosines are 0, all ties.
    same = np.tile(rng.normal(size=8), (3, 1)) + 0.1
    assert (cosines(normalised(centred(same)), normalised(centred(same))) == 0).all()


def test_cosines_of_dense_and_sparse_vectors() -> None:
    texts = ["river stone", "stone lamp lamp", "?", "river stone"]
    sparse = tfidf(texts)
    expected = cosine_similarity(sparse)
    np.testing.assert_allclose(cosines(sparse, sparse), expected, atol=1e-9)
    np.testing.assert_allclose(cosines(sparse.toarray(), sparse.toarray()), expected, atol=1e-9)
    order = np.array([1, 0, 3, 0])
    for vectors in (sparse, sparse.toarray()):
        np.testing.assert_allclose(paired_cosines(vectors, vectors[order]), expected[range(4), order], atol=1e-9)
    assert cosines(sparse, sparse)[0, 3] == 1.0  # equal to the bit, so that it is a tie
    assert (cosines(sparse, sparse)[2] == 0).all()  # a text without a word is like none
    assert cosines(tfidf(["?", "!"]), tfidf(["?", "!"])).tolist() == [[0, 0], [0, 0]]
    assert tfidf([" ".join(WORDS)]).shape == (1, len(WORDS))
