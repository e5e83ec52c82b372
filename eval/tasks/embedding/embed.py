"""Vectors of texts: pooled hidden states, centred or not, and TF-IDF; and the cosines between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.shared.pooling import Pooling, pooled_states
from eval.shared.training import micro_batches
from eval.subject import Subject
from pretrain.model.transformer import NystromformerLM, build_model

Floats = NDArray[np.float64]
# Cosines are compared to so many decimals: equal vectors are ties in whatever order a library adds.
DECIMALS = 9


@dataclass(frozen=True)
class Texts:
    """Different texts, as the network reads them. ``lengths``: (n,) tokens of the whole texts."""

    texts: list[str]
    tokens: list[list[int]]
    lengths: NDArray[np.int64]

    @property
    def cut(self) -> NDArray[np.bool_]:
        """(n,) whether the end of the text is not read."""
        return self.lengths > np.array([len(ids) for ids in self.tokens])

    def read(self, tokenizer: Tokenizer) -> list[str]:
        """What is read of each, as text again."""
        return [tokenizer.decode(ids) for ids in self.tokens]


def as_tokens(tokenizer: Tokenizer, texts: list[str], max_length: int, source: str) -> Texts:
    """Texts as at most ``max_length`` tokens; raises :class:`UserError` for one without any token."""
    encoded = [list(ids) for ids in tokenizer.encode_batch(texts)]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise UserError(f"{source}: the text {text[:40]!r} has no token: leave its record out")
    return Texts(texts, [ids[:max_length] for ids in encoded], np.array([len(ids) for ids in encoded]))


def network_of(subject: Subject, seed: int | None) -> NystromformerLM:
    """The subject's network; with a ``seed`` one of its kind with random weights, which leaves torch's state alone."""
    if seed is None:
        return subject.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(subject.loaded.model_config).to(subject.device).eval()


@torch.inference_mode()
def embed(
    network: NystromformerLM,
    tokens: Sequence[Sequence[int]],
    pooling: Pooling,
    *,
    micro_tokens: int,
    pad_id: int,
    on_batch: Callable[[int], None] = lambda texts: None,
) -> Floats:
    """(n, hidden_size) float64, computed in float32; equal sequences are computed once and have one vector.

    A forward pass holds at most ``micro_tokens`` tokens, padding included; ``on_batch`` is called after each with the
    number of its sequences. Raises :class:`UserError` for vectors that are not finite.
    """
    device = next(network.parameters()).device
    rows: dict[tuple[int, ...], int] = {}
    place = np.array([rows.setdefault(tuple(ids), len(rows)) for ids in tokens])
    different = list(rows)
    sizes = np.array([len(ids) for ids in different])
    found = np.zeros((len(different), network.config.hidden_size))
    for part in micro_batches(sizes, np.arange(len(different)), micro_tokens):
        lengths = torch.from_numpy(sizes[part])
        ids = torch.full((len(part), int(lengths.max())), pad_id)
        for row, index in enumerate(part):
            ids[row, : lengths[row]] = torch.tensor(different[index])
        found[part] = pooled_states(network, ids.to(device), lengths.to(device), pooling).double().cpu().numpy()
        on_batch(len(part))
    if not np.isfinite(found).all():
        raise UserError("hidden states of the model are not finite: its weights are damaged, or training diverged")
    return found[place]


def centred(vectors: Floats) -> Floats:
    """``vectors`` (n, d) less their mean. Where that leaves nothing but rounding, zeros."""
    moved = vectors - vectors.mean(0)
    size, whole = np.linalg.norm(moved, axis=1), np.linalg.norm(vectors, axis=1).mean()
    return np.where(size[:, None] > 1e-9 * whole, moved, 0.0)


def normalised(vectors: Floats) -> Floats:
    """Each vector at length 1, zeros as they are: their cosine with anything is 0."""
    size = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(size > 0, size, 1.0)


def tfidf(texts: Sequence[str]) -> Any:
    """(n, words) sparse TF-IDF vectors of length 1, counts as 1 + log, the weights of words from these very texts.

    Texts of which none has a word get an empty matrix.
    """
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    except ValueError:  # not one word
        return scipy.sparse.csr_array((len(texts), 1), dtype=np.float64)


def cosines(first: Any, second: Any) -> Floats:
    """(n, m) cosines of all of ``first`` (n, d) with all of ``second`` (m, d), both normalised, dense or sparse."""
    found = first @ second.T
    return np.round(found.toarray() if hasattr(found, "toarray") else found, DECIMALS)


def paired_cosines(first: Any, second: Any) -> Floats:
    """(n,) cosines of row i with row i, of normalised vectors, dense or sparse."""
    product = first.multiply(second) if hasattr(first, "multiply") else first * second
    return np.round(np.asarray(product.sum(axis=1)).ravel(), DECIMALS)
