"""What a shard folder holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.shards.shardset import ShardSet


@dataclass(frozen=True)
class Summary:
    """Counts over the whole token stream."""

    tokens: int
    documents: int
    bytes_per_token: float  # UTF-8 bytes of text for each token, the ``</s>`` of each document counted as a token
    unigram_entropy: float  # nats per token: the loss of a model that knows only how frequent each token is
    distinct_tokens: int


def summarise(shards: ShardSet) -> Summary:
    """Read the token stream once and count."""
    counts = np.zeros(shards.vocab_size, dtype=np.int64)
    for chunk in shards.chunks():
        counts += np.bincount(chunk, minlength=shards.vocab_size)[: shards.vocab_size]
    return Summary(
        tokens=shards.num_tokens,
        documents=shards.num_documents,
        bytes_per_token=shards.manifest.text_bytes / shards.num_tokens,
        unigram_entropy=entropy(counts),
        distinct_tokens=int(np.count_nonzero(counts)),
    )


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that ``counts`` (any shape) are proportional to."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
