"""Which scored passages stand in the training text (13-grams, Brown et al. 2020, appendix C), and the loss without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.quality.contamination import DEFAULT_N, SHORTEST, contamination
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.tasks.language_modeling import LMSettings
from eval.tasks.language_modeling.text import Stream


@dataclass(frozen=True)
class Overlap:
    """``share`` of the ``judged`` passages are contaminated; ``rest``: nats, tokens, bytes and words of the others."""

    share: float
    judged: int
    rest: dict[str, float]
    note: str


def fingerprint(settings: LMSettings) -> str:
    """Of the training shards to look in, "" without any. Raises :class:`UserError` where there are none."""
    return ShardSet.open(settings.contamination).fingerprint if settings.contamination else ""


def overlap(stream: Stream, records: list[dict[str, Any]], settings: LMSettings, parts: Parts) -> Overlap:
    """Look for the passages of ``records`` in the training shards; each record gets its ``overlap`` (share of its
    13-grams found, None: too short to judge) and ``nats_clean``, ``tokens_clean`` and ``bytes_clean``: 0 where it is
    set aside."""
    path, threshold = settings.contamination, settings.contamination_threshold
    if path is None:
        raise UserError("no training shards to look in: name them with contamination")

    def work() -> list[list[int]]:
        texts = [stream.spans(record["document"]).texts[record["passage"]] for record in records]
        found = contamination(ShardSet.open(path), texts)
        return [[int(grams), int(hits)] for grams, hits in zip(found.grams, found.found, strict=True)]

    rest = dict.fromkeys(("nats", "tokens", "bytes", "words"), 0.0)
    judged = hit = aside = 0
    touched: set[int] = set()
    for record, (grams, hits) in zip(records, parts.one("contamination", work), strict=True):
        dirty = hits > 0 and hits / grams >= threshold
        judged += grams > 0
        hit += hits > 0
        aside += dirty
        if dirty:
            touched.add(record["document"])
        record["overlap"] = hits / grams if grams else None
        for key in rest:
            kept = 0 if dirty else record[key]
            rest[key] += kept
            if key != "words":
                record[f"{key}_clean"] = kept
    note = (
        f"Of {len(records):,} passages {hit:,} share a {DEFAULT_N}-gram of words with the training text {path}, and "
        f"{aside:,} (of {len(touched):,} documents) at least {threshold:.0%} of theirs; {len(records) - judged:,} of "
        f"fewer than {SHORTEST} words are not judged."
    )
    return Overlap(aside / max(judged, 1), judged, rest, note)
