"""``nystrom data stdlib``."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.console import add_json, print_json, say_next
from data_pipeline.units import format_bytes

SUMMARY = "collect this Python's own standard library (source and documentation) as a small corpus, without a download"
EXAMPLE = "nystrom data stdlib --out corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSONL files")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.builtin import write_stdlib_corpus

    corpus = write_stdlib_corpus(args.out)
    if args.json:
        files = {
            name: {"documents": documents, "bytes": corpus.bytes[name]} for name, documents in corpus.documents.items()
        }
        print_json({"folder": corpus.folder, "written": corpus.changed, "files": files, "classes": corpus.labels})
        return
    print(f"{corpus.folder}: " + ("written" if corpus.changed else "already there, unchanged"))
    for name, documents in corpus.documents.items():
        print(f"  {name:<20} {documents:>6,} documents  {format_bytes(corpus.bytes[name]):>10}")
    classes = ", ".join(f"{label} ({count})" for label, count in corpus.labels.items())
    print(f"  classes of classify-*.jsonl, with their modules: {classes}")
    text, tokenizer = corpus.folder / "train.jsonl", corpus.folder.parent / "tokenizer"
    say_next(["data", "tokenizer", "--input", text, "--vocab-size", 8192, "--out", tokenizer])
