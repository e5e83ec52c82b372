"""Queries and the texts that are right for them: from a file of pairs, or from both ends of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError
from eval.shared.labelled import read_texts
from eval.tasks.embedding import RetrievalSettings
from eval.tasks.embedding.networks import draw


@dataclass(frozen=True)
class Pairs:
    """Different queries, different documents, and for each query the places of the documents that are right for it.

    ``short``: documents that were too short to take two passages from.
    """

    queries: list[str]
    documents: list[str]
    right: list[list[int]]
    records: int
    path: str
    hash: str
    short: int = 0

    @classmethod
    def read(cls, settings: RetrievalSettings) -> Pairs:
        """Read what the (resolved) settings name; raises :class:`UserError` for what is missing or does not fit."""
        assert settings.test
        short = 0
        if settings.document_field is None:
            fields = settings.query_field, settings.positive_field
            (queries, positives), digest = read_texts(
                settings.test, fields, ("--query-field", "--positive-field"), settings.quotes
            )
        else:
            (documents,), digest = read_texts(
                settings.test, (settings.document_field,), ("--document-field",), settings.quotes
            )
            cut = [ends(document, settings.passage_words) for document in documents]
            found = [pair for pair in cut if pair is not None]
            short = len(cut) - len(found)
            if not found:
                raise UserError(f"{settings.test}: no document has two words, to take two passages from")
            queries, positives = [pair[0] for pair in found], [pair[1] for pair in found]
        chosen = draw(len(queries), settings.test_records)
        digest = hashlib.sha256(f"{digest} {chosen.tolist()}".encode()).hexdigest()
        grouped = _group([queries[i] for i in chosen], [positives[i] for i in chosen])
        pairs = cls(*grouped, len(chosen), settings.test, digest, short)
        if len(pairs.documents) < 2:
            raise UserError(
                f"{settings.test} has one different text to be found only: any ranking of it is right; at least 2 "
                f"pairs are needed, and some hundreds to tell models apart"
            )
        return pairs

    def describe(self) -> dict[str, Any]:
        """What the result says about the data."""
        found: dict[str, Any] = {"test": self.path, "records": self.records, "queries": len(self.queries)}
        found |= {"documents": len(self.documents)} | ({"too_short": self.short} if self.short else {})
        return found | {"hash": self.hash}

    def item_ids(self) -> list[str]:
        """SHA-256 (the first 32 hex digits) of each query."""
        return [hashlib.sha256(query.encode()).hexdigest()[:32] for query in self.queries]


def ends(document: str, words: int) -> tuple[str, str] | None:
    """The first and the last ``words`` words of a document, at most half of it each; None of a single word.

    As in the inverse cloze task (Lee et al. 2019), what is looked for is another passage of the same document.
    """
    found = document.split()
    if len(found) < 2:
        return None
    size = min(words, len(found) // 2)
    return " ".join(found[:size]), " ".join(found[-size:])


def _group(queries: Sequence[str], positives: Sequence[str]) -> tuple[list[str], list[str], list[list[int]]]:
    """Each query and each document once. Right for a query is what any of its records names: so a document that
    stands in several records counts whichever record it was found by."""
    documents: dict[str, int] = {}
    right: dict[str, dict[int, None]] = {}
    for query, positive in zip(queries, positives, strict=True):
        right.setdefault(query, {})[documents.setdefault(positive, len(documents))] = None
    return list(right), list(documents), [list(places) for places in right.values()]
