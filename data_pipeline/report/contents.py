"""What is said of a shard folder, the same in the terminal, in JSON and on the page."""

from __future__ import annotations

import re
from typing import Any

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.shards.summary import PERCENTILES, Sample, Summary

FREQUENT = 30


def contents(shards: ShardSet, summary: Summary, samples: list[Sample]) -> dict[str, Any]:
    """Everything as plain JSON values. Shares are between 0 and 1, lengths are in tokens with the closing ``</s>``."""
    manifest, lengths = shards.manifest, summary.lengths
    edges = lengths.log2_edges()
    documents, tokens = (column.tolist() for column in lengths.histogram(edges))
    return {
        "folder": shards.path.resolve().name,
        "fingerprint": shards.fingerprint,
        "documents": summary.documents,
        "tokens": summary.tokens,
        "text_bytes": manifest.text_bytes or None,  # tokens that were imported: nobody has seen their text
        "bytes_per_token": summary.bytes_per_token or None,
        "tokens_per_document": summary.tokens / summary.documents,
        "unigram_entropy": summary.unigram_entropy,
        "dtype": manifest.dtype,
        "shards": len(manifest.shards),
        "inputs": len(manifest.inputs),
        "vocab_size": shards.vocab_size,
        "distinct_tokens": summary.distinct_tokens,
        "tokenizer_hash": shards.tokenizer_hash,
        "settings": manifest.settings,
        "left_out": left_out(manifest),
        "reports": [entry.name for entry in manifest.reports],
        "length_percentiles": {str(p): lengths.percentile(p) for p in PERCENTILES},
        "longer_than": [
            {"limit": limit, "documents": share[0], "tokens": share[1]}
            for limit in lengths.limits()
            for share in [lengths.longer_than(limit)]
        ],
        "length_histogram": [
            {"from": low, "below": high, "documents": of_documents, "tokens": of_tokens}
            for low, high, of_documents, of_tokens in zip(edges[:-1], edges[1:], documents, tokens, strict=True)
        ],
        "frequent_tokens": [
            {"id": token, "text": token_text(shards, token, text), "count": count, "share": count / summary.tokens}
            for (token, count), text in zip(*_decoded(shards, summary), strict=True)
        ],
        "sources": [
            {"name": name, "documents": of_documents, "tokens": of_tokens, "share": of_tokens / summary.tokens}
            for name, (of_documents, of_tokens) in summary.sources.items()
        ],
        "samples": [
            {
                "document": sample.document,
                "source": sample.source,
                "tokens": sample.tokens,
                "text": sample.text,
                "whole": sample.whole,
            }
            for sample in samples
        ],
    }


def left_out(manifest: Manifest) -> list[dict[str, Any]]:
    """Records that did not become documents: why, and how many."""
    reasons = {"no text": manifest.empty_documents}
    reasons |= {f"broken record: {why}": count for why, count in manifest.bad_records.items()}
    reasons |= {f"dropped: {why}": count for why, count in manifest.dropped_documents.items()}
    return [{"reason": reason, "records": count} for reason, count in reasons.items() if count]


def _decoded(shards: ShardSet, summary: Summary) -> tuple[list[tuple[int, int]], list[str]]:
    tokenizer, frequent = shards.tokenizer(), summary.frequent_tokens(FREQUENT)
    return frequent, [tokenizer.decode([token]) for token, _ in frequent]


def token_text(shards: ShardSet, token: int, text: str) -> str:
    """A token as a reader can see it: white space as signs, special tokens by their part, like ``<eos>``."""
    for role, special in shards.manifest.special_ids.items():
        if special == token:
            return f"<{role}>"
    return visible(text) or f"<{token}>"


def visible(text: str) -> str:
    """White space and control characters as signs that can be seen."""
    text = re.sub(" {4,}", lambda run: f"␣×{len(run[0])}", text)
    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
