"""What a shard folder holds, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet

PERCENTILES = (1, 10, 50, 90, 99, 100)
SHORTEST_LIMIT = 512
SAMPLE_TOKENS = 256


class Lengths:
    """How long the documents are: exact counts of each length, in tokens with the closing ``</s>``.

    Memory is bounded by the distinct lengths, of which N tokens have fewer than sqrt(2N): 1.5 million for 10^12.
    """

    def __init__(self) -> None:
        self.values = np.empty(0, dtype=np.int64)  # distinct lengths, rising
        self.counts = np.empty(0, dtype=np.int64)  # documents of each

    def add(self, lengths: np.ndarray) -> None:
        """Count documents of these lengths (documents,) of any integer dtype."""
        values, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
        self.values, place = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        merged = np.zeros(len(self.values), dtype=np.int64)
        np.add.at(merged, place, np.concatenate([self.counts, counts]))
        self.counts = merged

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        return int((self.values * self.counts).sum())

    @property
    def longest(self) -> int:
        return int(self.values[-1])

    def percentile(self, percent: int) -> int:
        """The smallest length that at least ``percent`` in a hundred documents do not exceed."""
        rank = max(1, -(-self.documents * percent // 100))
        return int(self.values[np.searchsorted(np.cumsum(self.counts), rank)])

    def longer_than(self, limit: int) -> tuple[float, float]:
        """Share of the documents with more than ``limit`` tokens, and share of all tokens that stand in them."""
        longer = self.values > limit
        tokens = (self.values[longer] * self.counts[longer]).sum()
        return float(self.counts[longer].sum() / self.documents), float(tokens / self.tokens)

    def limits(self) -> list[int]:
        """512, and 1024, 2048, ... as far as there are longer documents."""
        out = [SHORTEST_LIMIT]
        while 2 * out[-1] < self.longest:
            out.append(2 * out[-1])
        return out

    def histogram(self, edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Documents, and the tokens in them, of each length from ``edges[i]`` up to but without ``edges[i + 1]``.

        Both (len(edges) - 1,) int64. The edges must reach beyond the shortest and the longest document.
        """
        bins = np.searchsorted(edges, self.values, side="right") - 1
        documents, tokens = np.zeros((2, len(edges) - 1), dtype=np.int64)
        np.add.at(documents, bins, self.counts)
        np.add.at(tokens, bins, self.counts * self.values)
        return documents, tokens

    def log2_edges(self, parts: int = 1) -> list[int]:
        """Edges for :meth:`histogram`: every octave cut into ``parts`` bins of equal width on a log scale."""
        low, high = int(self.values[0]), self.longest
        last = high.bit_length() * parts
        edges = sorted({round(2 ** (i / parts)) for i in range(last + 1)})
        first = max(i for i, edge in enumerate(edges) if edge <= low)
        past = min(i for i, edge in enumerate(edges) if edge > high)
        return edges[first : past + 1]


@dataclass(frozen=True)
class Sample:
    """The beginning of a document."""

    document: int  # place in the stream, from 0
    source: str  # name of the input it came from
    tokens: int  # of the whole document, the closing </s> included
    text: str
    whole: bool  # the text is the whole document


@dataclass(frozen=True)
class Summary:
    """Counts over the whole token stream."""

    tokens: int
    documents: int
    bytes_per_token: float  # UTF-8 bytes of text for each token, the ``</s>`` of each document counted as a token
    unigram_entropy: float  # nats per token: the loss of a model that knows only how frequent each token is
    distinct_tokens: int
    token_counts: np.ndarray  # (vocab_size,) int64
    lengths: Lengths
    sources: dict[str, tuple[int, int]]  # input -> documents and tokens from it, most tokens first

    def frequent_tokens(self, number: int) -> list[tuple[int, int]]:
        """The ``number`` most frequent tokens that occur: (id, count), the lower id first among equals."""
        order = np.argsort(-self.token_counts, kind="stable")[:number]
        return [(int(i), int(self.token_counts[i])) for i in order if self.token_counts[i]]


def summarise(shards: ShardSet, on_tokens: Callable[[int], object] = lambda count: None) -> Summary:
    """Read the token stream once and count.

    Memory does not grow with the stream: it is that of the vocabulary, the distinct lengths, the names of the inputs
    and the index of one shard. ``on_tokens`` is called with the size of each chunk read. Raises :class:`UserError` for
    a damaged shard.
    """
    counts = np.zeros(shards.vocab_size, dtype=np.int64)
    for chunk in shards.chunks():
        found = np.bincount(chunk, minlength=shards.vocab_size)
        if len(found) > shards.vocab_size:
            raise UserError(
                f"{shards.path} is damaged: it holds token {len(found) - 1}, outside the vocabulary of "
                f"{shards.vocab_size}; `nystrom data verify {shards.path}` says where"
            )
        counts += found
        on_tokens(len(chunk))
    lengths, sources = Lengths(), dict[str, tuple[int, int]]()
    for shard in shards.manifest.shards:
        of_shard = np.diff(shards.document_ends(shard.index).astype(np.int64), prepend=0)
        lengths.add(of_shard)
        names, places = shards.document_sources(shard.index)
        documents = np.bincount(places, minlength=len(names))
        tokens = np.zeros(len(names), dtype=np.int64)
        np.add.at(tokens, places, of_shard)
        for name, more_documents, more_tokens in zip(names, documents, tokens, strict=True):
            before = sources.get(name, (0, 0))
            sources[name] = (before[0] + int(more_documents), before[1] + int(more_tokens))
    return Summary(
        tokens=shards.num_tokens,
        documents=shards.num_documents,
        bytes_per_token=shards.manifest.text_bytes / shards.num_tokens,
        unigram_entropy=entropy(counts),
        distinct_tokens=int(np.count_nonzero(counts)),
        token_counts=counts,
        lengths=lengths,
        sources=dict(sorted(sources.items(), key=lambda item: (-item[1][1], item[0]))),
    )


def sample_documents(shards: ShardSet, number: int) -> list[Sample]:
    """Beginnings of ``number`` documents at even distances through the stream; always the same ones."""
    number = min(number, shards.num_documents)
    wanted = ((2 * np.arange(number) + 1) * shards.num_documents) // (2 * number) if number else np.empty(0, np.int64)
    tokenizer = shards.tokenizer()
    samples = []
    documents_before = tokens_before = 0
    for shard in shards.manifest.shards:
        inside = wanted[(wanted >= documents_before) & (wanted < documents_before + shard.num_documents)]
        if len(inside):
            ends = shards.document_ends(shard.index).astype(np.int64)
            names, places = shards.document_sources(shard.index)
        for document in inside - documents_before:
            start = int(ends[document - 1]) if document else 0
            length = int(ends[document]) - start
            shown = min(length - 1, SAMPLE_TOKENS)  # without the </s>
            ids = shards.read(np.array([tokens_before + start]), shown)[0] if shown else np.empty(0, dtype=np.int64)
            text, whole = tokenizer.decode(ids), shown == length - 1
            if not whole:
                text = text.rstrip("\ufffd")  # a character cut in two by the end of the excerpt
            samples.append(Sample(int(document) + documents_before, names[places[document]], length, text, whole))
        documents_before += shard.num_documents
        tokens_before += shard.num_tokens
    return samples


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that ``counts`` (any shape) are proportional to."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
