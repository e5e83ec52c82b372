"""From losses of tokens to records of passages: what intervals resample and what two models are paired by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.tasks.language_modeling.text import Stream

# document, passage, first token and the one behind the last, nats, bytes, words, whether that is all of the passage,
# hash of the passage's text, place of its first token in the stream
Piece = list[Any]


def pieces(stream: Stream, begin: int, nats: NDArray[np.float64]) -> list[Piece]:
    """The tokens [begin, begin + n) of the stream with their ``nats`` (n,), summed by passage."""
    end = begin + len(nats)
    found: list[Piece] = []
    first = int(np.searchsorted(stream.edges, begin, side="right")) - 1
    last = int(np.searchsorted(stream.edges, end - 1, side="right")) - 1
    for document in range(first, last + 1):
        spans = stream.spans(document)
        base = int(stream.edges[document])
        edges = spans.passages + base
        reached = np.searchsorted(edges, (begin, end - 1), side="right") - 1
        for passage in range(max(int(reached[0]), 0), min(int(reached[1]) + 1, len(edges) - 1)):
            low, high = max(int(edges[passage]), begin), min(int(edges[passage + 1]), end)
            if low < high:
                found.append(
                    [
                        document,
                        passage,
                        low,
                        high,
                        float(nats[low - begin : high - begin].sum()),
                        int(spans.bytes[high - base] - spans.bytes[low - base]),
                        int(spans.words[high - base] - spans.words[low - base]),
                        [int(edges[passage]), int(edges[passage + 1])],
                        spans.passage_id(passage),
                        spans.exact,
                    ]
                )
    return found


def records_of(found: Sequence[Piece], apart: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """Records of pieces in the order of the stream, those put together that parts of the work cut in two; and whether
    all of the text was exact.

    The ``id`` is the hash of the passage's text where all of it was scored (but for the first token, which nothing
    predicts, of the stream, or of each document where they are ``apart``), so that models of other tokenizers have the
    same; else with the tokens that were. Copies of a passage have one ``id``: they are one item, counted several times.
    """
    joined: list[Piece] = []
    for piece in found:
        before = joined[-1] if joined else None
        if before is not None and before[:2] == piece[:2] and before[3] == piece[2]:
            joined[-1] = [*before[:3], piece[3], *(before[i] + piece[i] for i in (4, 5, 6)), *before[7:]]
        else:
            joined.append(piece)
    records = []
    for document, passage, low, high, nats, size, words, (first, last), text_id, _ in joined:
        unpredicted = first == 0 or (apart and passage == 0)
        whole = low <= first + unpredicted and high == last
        records.append(
            {
                "id": text_id if whole else f"{text_id}:{low - first}-{high - first}",
                "document": document,
                "passage": passage,
                "nats": nats,
                "tokens": high - low,
                "bytes": size,
                "words": words,
            }
        )
    return records, all(piece[-1] for piece in joined)
