"""``nystrom data inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.cli.common import counted

SUMMARY = "say what a shard folder holds"
EXAMPLE = "nystrom data inspect shards/train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("shards", type=Path, metavar="DIR", help="shard folder")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.shards.shardset import ShardSet
    from data_pipeline.shards.summary import summarise

    shards = ShardSet.open(args.shards)
    manifest, summary, tokenizer = shards.manifest, summarise(shards), shards.tokenizer()
    rows = [
        ("tokens", f"{summary.tokens:,} ({manifest.dtype}, {len(manifest.shards)} shard(s))"),
        (
            "documents",
            f"{counted(summary.documents, manifest.empty_documents)} from {len(manifest.inputs)} file(s)",
        ),
        ("tokens per document", f"{summary.tokens / summary.documents:,.1f} on average"),
        ("bytes per token", f"{summary.bytes_per_token:.3f} ({manifest.text_bytes:,} bytes of text)"),
        (
            "tokenizer",
            f"{tokenizer.vocab_size:,} tokens, {summary.distinct_tokens:,} of them used, hash {tokenizer.hash[:12]}",
        ),
        (
            "unigram entropy",
            f"{summary.unigram_entropy:.4f} nats per token (the loss of knowing only how frequent tokens are)",
        ),
        ("fingerprint", shards.fingerprint),
    ]
    print(args.shards)
    for name, value in rows:
        print(f"  {name:<20} {value}")
    print("  beginnings of the first documents:")
    for ids in shards.documents(limit=3):
        print(f"    {tokenizer.decode(ids[:24])!r}")
