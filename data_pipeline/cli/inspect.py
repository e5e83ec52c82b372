"""``nystrom data inspect``."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from data_pipeline.console import add_json, print_json, say_next
from data_pipeline.errors import UserError

SUMMARY = "say what a shard folder holds: sizes, document lengths, frequent tokens, sources, samples"
EXAMPLE = "nystrom data inspect shards/train --page train.html"
HELD_OUT = ("valid", "validation", "heldout", "test")
BAR = 40  # characters of the longest bar
SHOWN_SOURCES, SHOWN_TOKENS, SHOWN_CHARACTERS = 8, 12, 90


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("shards", type=Path, metavar="DIR", help="shard folder")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write it all as one HTML page")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="documents to show, from all over the text")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.samples < 0:
        raise UserError(f"--samples {args.samples}: must be 0 or more")
    if args.page is not None and args.page.is_dir():
        raise UserError(f"--page {args.page} is a folder: name the page, for example {args.page / 'shards.html'}")
    from data_pipeline.bars import counting
    from data_pipeline.files import check_writable, write_atomic
    from data_pipeline.report.contents import contents
    from data_pipeline.shards.shardset import ShardSet
    from data_pipeline.shards.summary import sample_documents, summarise

    if args.page is not None:
        check_writable(args.page)
    shards = ShardSet.open(args.shards)
    with counting("counting", shards.num_tokens, " tokens") as update:
        summary = summarise(shards, update)
    found = contents(shards, summary, sample_documents(shards, args.samples))
    if args.page is not None:
        from data_pipeline.report.page import render

        page = render(found, summary.lengths)
        try:
            args.page.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(args.page, page.encode())
        except OSError as error:
            raise UserError(f"{args.page} cannot be written: {error}") from None
    if args.json:
        print_json(found)
        return
    print(args.shards)
    print("\n".join(_lines(found)))
    if args.page is not None:
        print(f"page written to {args.page.resolve()}")
    say_next(_next(args.shards))


def _next(shards: Path) -> list[object]:
    """A first configuration for these shards. Folders side by side may be training and held-out text by their names."""
    from data_pipeline.shards.manifest import MANIFEST_FILE

    def beside(*names: str) -> Path | None:
        return next(
            (p for name in names if (p := shards.parent / name) != shards and (p / MANIFEST_FILE).is_file()), None
        )

    train, valid = shards, beside(*HELD_OUT)
    if shards.name in HELD_OUT and (found := beside("train")) is not None:
        train, valid = found, shards
    out = next(p for n in itertools.count(1) if not (p := Path("run.yaml" if n == 1 else f"run-{n}.yaml")).exists())
    return ["init", "--data", train, *(["--valid", valid] if valid is not None else []), "--out", out]


def _lines(found: dict[str, Any]) -> list[str]:
    skipped = "".join(f"; {row['reason']}: {row['records']:,}" for row in found["left_out"])
    facts = [
        ("tokens", f"{found['tokens']:,} ({found['dtype']}, {found['shards']:,} shard(s))"),
        ("documents", f"{found['documents']:,} from {found['inputs']:,} input(s)"),
        ("left out", skipped.removeprefix("; ") or "nothing"),
        ("tokens per document", f"{found['tokens_per_document']:,.1f} on average"),
        ("bytes per token", _bytes_per_token(found)),
        (
            "tokenizer",
            f"{found['vocab_size']:,} tokens, {found['distinct_tokens']:,} of them used, "
            f"hash {found['tokenizer_hash'][:12]}",
        ),
        (
            "unigram entropy",
            f"{found['unigram_entropy']:.4f} nats per token (the loss of knowing only how frequent tokens are)",
        ),
        ("fingerprint", found["fingerprint"]),
    ]
    lines = [f"  {name:<20} {value}" for name, value in facts]
    lines += ["", "  document lengths in tokens, the end of the document counted", *_histogram(found)]
    at_most = ", ".join(
        f"{'all' if percent == '100' else percent + '%'} {length:,}"
        for percent, length in found["length_percentiles"].items()
    )
    lines.append(f"  of the documents, at most this long: {at_most}")
    for row in found["longer_than"]:
        lines.append(
            f"  longer than {row['limit']:>9,}: {row['documents']:>6.1%} of the documents, {row['tokens']:>6.1%} of "
            "the tokens"
        )
    lines += ["", "  most frequent tokens"]
    shown = [f"{token['text']} {token['share']:.1%}" for token in found["frequent_tokens"][:SHOWN_TOKENS]]
    lines += ["    " + "   ".join(shown[start : start + 6]) for start in range(0, len(shown), 6)]
    lines += ["", "  sources with the most tokens"]
    for source in found["sources"][:SHOWN_SOURCES]:
        lines.append(f"    {source['share']:>6.1%}  {source['name']} ({source['documents']:,} documents)")
    if len(found["sources"]) > SHOWN_SOURCES:
        lines.append(f"    and {len(found['sources']) - SHOWN_SOURCES:,} more")
    if found["samples"]:
        lines += ["", "  beginnings of documents from all over the text"]
    lines += [f"    {sample['text'][:SHOWN_CHARACTERS]!r}" for sample in found["samples"]]
    return lines


def _bytes_per_token(found: dict[str, Any]) -> str:
    if found["text_bytes"] is None:
        return "not known: the shards were imported as tokens"
    return f"{found['bytes_per_token']:.3f} ({found['text_bytes']:,} bytes of text)"


def _histogram(found: dict[str, Any]) -> list[str]:
    rows = found["length_histogram"]
    most = max(row["documents"] for row in rows)
    lines = []
    for row in rows:
        bar = "#" * -(-BAR * row["documents"] // most)
        span = f"{row['from']:,} - {row['below'] - 1:,}"
        lines.append(f"    {span:>19} {row['documents']:>12,}  {bar}")
    return lines
