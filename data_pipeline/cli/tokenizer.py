"""``nystrom data tokenizer``."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from data_pipeline.cli.common import Progress, add_inputs, counted
from data_pipeline.errors import UserError
from data_pipeline.sources.inputs import expand_inputs, identify_inputs, total_text_bytes

INFO_FILE = "tokenizer_info.json"

SUMMARY = "train a byte-level BPE tokenizer on text"
EXAMPLE = "nystrom data tokenizer --input 'books/*.txt' --vocab-size 16384 --out tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_inputs(parser)
    parser.add_argument(
        "--vocab-size", type=int, default=32768, metavar="N", help="tokens, with the 256 bytes and 5 special tokens"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tokenizer.json")
    parser.add_argument("--overwrite", action="store_true", help="replace another tokenizer that is there")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.files import write_atomic
    from data_pipeline.sources.documents import Counts, iter_documents
    from data_pipeline.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer, check_vocab_size, train_tokenizer

    check_vocab_size(args.vocab_size)
    paths = expand_inputs(args.input)
    facts = {
        "inputs": [asdict(entry) for entry in identify_inputs(paths)],
        "text_field": args.text_field,
        "vocab_size": args.vocab_size,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    info, file = args.out / INFO_FILE, args.out / TOKENIZER_FILE
    if file.exists() and not args.overwrite:
        there = Tokenizer.load(args.out)
        if _same_training(info, key, there.hash):
            print(f"{args.out}: already trained on this text, {there.vocab_size:,} tokens (hash {there.hash[:12]})")
            return
        raise UserError(
            f"{args.out} already holds a tokenizer trained otherwise ({there.vocab_size:,} tokens): choose another "
            "folder, or --overwrite to replace it"
        )
    counts = Counts()
    progress = Progress("reading", total_text_bytes(paths))

    def texts() -> Iterator[str]:
        for document in iter_documents(paths, args.text_field, counts):
            progress.document(document)
            yield document.text
        progress.close()
        if sys.stderr.isatty():
            print(f"learning {args.vocab_size:,} tokens ...", file=sys.stderr, flush=True)

    try:
        trained = train_tokenizer(texts(), args.vocab_size)
        trained.save(args.out)
        write_atomic(info, (json.dumps({"key": key, "tokenizer": trained.hash, **facts}, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error}") from None
    finally:
        progress.close(whole=False)
    if trained.vocab_size < args.vocab_size:
        print(
            f"the text has repeated pieces for {trained.vocab_size:,} tokens only, {args.vocab_size:,} were asked for: "
            "the vocabulary is that much smaller"
        )
    print(
        f"{args.out}: {trained.vocab_size:,} tokens (hash {trained.hash[:12]}) from "
        f"{counted(counts.documents, counts.empty)}, {counts.text_bytes / 1e6:.2f} MB of text in {progress.speed()}"
    )


def _same_training(info: Path, key: str, tokenizer_hash: str) -> bool:
    try:
        data = json.loads(info.read_bytes())
        return bool(data["key"] == key and data["tokenizer"] == tokenizer_hash)
    except (OSError, ValueError, KeyError, TypeError):
        return False
