"""``nystrom data contamination``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.cli.common import add_quotes
from data_pipeline.console import add_json, print_json
from data_pipeline.errors import UserError
from data_pipeline.processes import available_cores
from data_pipeline.units import format_bytes

if TYPE_CHECKING:
    from data_pipeline.quality.contamination import Contamination, Example
    from data_pipeline.shards.shardset import ShardSet
    from data_pipeline.sources.documents import Document
    from data_pipeline.sources.reading import Quotes

SUMMARY = "say how much of evaluation texts stands in shards, by 13-grams of words (Brown et al. 2020)"
EXAMPLE = "nystrom data contamination --shards shards/train --eval test.jsonl --out contamination.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--shards", type=Path, nargs="+", required=True, metavar="DIR", help="folders of shards")
    parser.add_argument(
        "--eval",
        nargs="+",
        required=True,
        metavar="FILE",
        help="evaluation texts: files of the kinds that prepare reads",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column with the text")
    add_quotes(parser)
    parser.add_argument("--n", type=int, default=13, metavar="N", help="words in a gram")
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="F", help="also count texts with at least this share of grams"
    )
    parser.add_argument("--examples", type=int, default=5, metavar="N", help="overlaps to show")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers and every text with a hit as JSON")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; left out: one for each core")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.n < 1:
        raise UserError(f"--n {args.n}: a gram has at least 1 word")
    if not 0 < args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: a share above 0 and at most 1")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    if args.examples < 0:
        raise UserError(f"--examples {args.examples}: 0 or more")
    if args.out is not None and args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder: name the file, for example {args.out / 'contamination.json'}")
    from data_pipeline.bars import counting
    from data_pipeline.files import check_writable
    from data_pipeline.quality.contamination import contamination
    from data_pipeline.shards.shardset import ShardSet

    if args.out is not None:
        check_writable(args.out)
    sets = [ShardSet.open(folder) for folder in args.shards]
    files = {file: _texts(file, args.text_field, args.quotes) for file in dict.fromkeys(args.eval)}
    texts = [document.text for part in files.values() for document in part]
    tokens = sum(shards.num_tokens for shards in sets)
    size = sum(shards.manifest.text_bytes for shards in sets)
    began = time.monotonic()
    with counting("searching", tokens, " tokens") as update:
        found = contamination(
            sets, texts, args.n, workers=args.workers or available_cores(), examples=args.examples, on_tokens=update
        )
    seconds = time.monotonic() - began
    rows, start = [], 0
    for file, part in files.items():
        rows.append(_row(file, found, start, part, args.threshold))
        start += len(part)
    result = _result(args, sets, rows, found.examples)
    if args.out is not None:  # first: whoever reads what is printed may go away
        _write(args.out, result)
    if args.json:
        print_json(result)
        return
    _tell(rows, found.examples, args)
    print(
        f"{tokens:,} tokens, {format_bytes(size)} of text, searched in {seconds:.1f} s, "
        f"{format_bytes(size / seconds)}/s"
    )
    if args.out is not None:
        print(f"written to {args.out.resolve()}")


def _texts(file: str, text_field: str, quotes: Quotes) -> list[Document]:
    from data_pipeline.sources.documents import iter_documents
    from data_pipeline.sources.reading import Reading
    from data_pipeline.sources.tally import Tally

    reading = Reading(text_field=text_field, quotes=quotes)
    # No broken record is passed over: every evaluation text counts.
    documents = list(iter_documents([file], reading, Tally(max_bad_fraction=0)))
    if not documents:
        raise UserError(f"{file} has no text in '{text_field}'")
    return documents


def _row(file: str, found: Contamination, start: int, texts: list[Document], threshold: float) -> dict[str, Any]:
    """The numbers of one evaluation file or pattern.

    Texts are numbered from 1 in it. Records without text have no number, so each hit also has its place: the ``source``
    (the file's name below the deepest common folder) and the ``record`` (line or row, from 1).
    """
    import numpy as np

    end = start + len(texts)
    inside = slice(start, end)
    hit = np.flatnonzero(found.found[inside])
    return {
        "file": file,
        "start": start,
        "texts": end - start,
        "too_short": int((found.grams[inside] == 0).sum()),
        "with_hits": len(hit),
        "at_threshold": int((found.share[inside][hit] >= threshold).sum()),
        "hits": [
            {
                "text": int(i) + 1,
                "source": texts[i].source,
                "record": texts[i].record,
                "grams": int(found.grams[start + i]),
                "found": int(found.found[start + i]),
                "share": float(found.share[start + i]),
                "longest_words": int(found.longest[start + i]),
            }
            for i in hit
        ],
    }


def _tell(rows: list[dict[str, Any]], examples: Sequence[Example], args: argparse.Namespace) -> None:
    for row in rows:
        judged = row["texts"] - row["too_short"]
        short = f" ({row['too_short']:,} of them too short to judge)" if row["too_short"] else ""
        print(f"{row['file']}: {row['texts']:,} texts{short}")
        for number, what in (
            (row["with_hits"], f"share a {args.n}-gram with the shards"),
            (row["at_threshold"], f"share at least {args.threshold:.0%} of theirs"),
        ):
            print(f"  {number:,} ({number / max(judged, 1):.2%}) {what}")
        for example in examples:
            if row["start"] <= example.text < row["start"] + row["texts"]:
                words = example.words.split()
                quoted = " ".join(words[:16]) + (" ..." if len(words) > 16 else "")
                print(
                    f"  text {example.text - row['start'] + 1}: {example.share:.0%} of its grams, {len(words):,} words "
                    f'in a row, in {example.shards}, document {example.document} ({example.source}): "{quoted}"'
                )


def _result(
    args: argparse.Namespace, sets: Sequence[ShardSet], rows: list[dict[str, Any]], examples: Sequence[Example]
) -> dict[str, Any]:
    """All numbers, and every text with a hit."""
    return {
        "n": args.n,
        "threshold": args.threshold,
        "shards": [{"folder": str(shards.path), "fingerprint": shards.fingerprint} for shards in sets],
        "files": [
            {key: value for key, value in row.items() if key != "start"}
            | {
                "examples": [
                    {
                        "text": example.text - row["start"] + 1,
                        "share": example.share,
                        "words": example.words,
                        "folder": str(example.shards),
                        "document": example.document,
                        "source": example.source,
                    }
                    for example in examples
                    if row["start"] <= example.text < row["start"] + row["texts"]
                ]
            }
            for row in rows
        ],
    }


def _write(out: Path, result: dict[str, Any]) -> None:
    from data_pipeline.files import write_atomic

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
