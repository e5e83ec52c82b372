"""``nystrom data tokenizer``."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.cli.common import (
    Progress,
    add_bad_fraction,
    add_inputs,
    bad_fraction_of,
    corpus_of,
    counted,
    input_words,
    other_kinds,
    reading_of,
)
from data_pipeline.console import add_json, print_json, say_next
from data_pipeline.errors import UserError
from data_pipeline.units import format_bytes

if TYPE_CHECKING:
    from data_pipeline.sources.corpus import Corpus
    from data_pipeline.sources.pieces import Piece
    from data_pipeline.sources.reading import Reading
    from data_pipeline.tokenization.tokenizer import Tokenizer

INFO_FILE = "tokenizer_info.json"

SUMMARY = "train a tokenizer on text"
EXAMPLE = "nystrom data tokenizer --input 'books/*.txt' --vocab-size 16384 --out tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_inputs(parser)
    add_bad_fraction(parser)
    parser.add_argument(
        "--model",
        choices=("bpe", "wordpiece", "unigram"),
        default="bpe",
        help="bpe works on bytes and loses nothing of the text; unigram loses nothing but U+2581; wordpiece, BERT's, "
        "keeps the words and not the white space between them",
    )
    parser.add_argument("--vocab-size", type=int, default=32768, metavar="N", help="tokens, with the 5 special tokens")
    parser.add_argument("--lowercase", action="store_true", help="wordpiece: remove case and accents, as BERT uncased")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tokenizer.json")
    parser.add_argument("--overwrite", action="store_true", help="replace another tokenizer that is there")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.files import check_writable, write_atomic
    from data_pipeline.sources.streams import piece_digest
    from data_pipeline.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
    from data_pipeline.tokenization.training import check_training, train_tokenizer

    check_training(args.vocab_size, args.model, args.lowercase)
    corpus, reading, share = corpus_of(args, args.out), reading_of(args), bad_fraction_of(args)
    if corpus is None:
        raise UserError("a tokenizer may read its text more than once: save standard input to a file first")
    if (told := other_kinds(corpus)) is not None:
        print(told, file=sys.stderr)
    pieces = corpus.pieces(sys.maxsize, reading)  # one for each file
    facts = {
        "inputs": [{"name": piece.name, "bytes": piece.end, "digest": piece_digest(piece)} for piece in pieces],
        "reading": reading.facts(),
        "vocab_size": args.vocab_size,
        "model": args.model,
        "lowercase": args.lowercase,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    info, file = args.out / INFO_FILE, args.out / TOKENIZER_FILE
    if file.exists() and not args.overwrite:
        there = Tokenizer.load(args.out)
        if _same_training(info, key, there.hash):
            if args.json:
                _print_json(args, there, trained=False)
                return
            print(f"{args.out}: already trained on this text, {there.vocab_size:,} tokens (hash {there.hash[:12]})")
            _say_next(args)
            return
        raise UserError(
            f"{args.out} already holds a tokenizer trained otherwise ({there.vocab_size:,} tokens): choose another "
            "folder, or --overwrite to replace it"
        )
    check_writable(file)
    texts = _Texts(corpus, pieces, reading, args.vocab_size, share)
    try:
        trained = train_tokenizer(texts, args.vocab_size, args.model, lowercase=args.lowercase)
        trained.save(args.out)
        write_atomic(info, (json.dumps({"key": key, "tokenizer": trained.hash, **facts}, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error}") from None
    finally:
        texts.close()
    if args.json:
        counts = texts.counts
        _print_json(args, trained, trained=True, documents=counts.documents, text_bytes=counts.text_bytes)
        return
    if trained.vocab_size < args.vocab_size:
        print(
            f"the text has repeated pieces for {trained.vocab_size:,} tokens only, {args.vocab_size:,} were asked for: "
            "the vocabulary is that much smaller"
        )
    print(
        f"{args.out}: {trained.vocab_size:,} tokens (hash {trained.hash[:12]}) from "
        f"{counted(texts.counts.documents, texts.counts.empty)}, {format_bytes(texts.counts.text_bytes)} of text in "
        f"{texts.progress.speed()}"
    )
    for sample in texts.counts.located()[:5]:
        print(f"  left out: {texts.counts.place(sample)}: {sample.detail}")
    _say_next(args)


def _print_json(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    *,
    trained: bool,
    documents: int | None = None,
    text_bytes: int | None = None,
) -> None:
    print_json(
        {
            "folder": args.out,
            "trained": trained,
            "model": args.model,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "documents": documents,
            "text_bytes": text_bytes,
        }
    )


def _say_next(args: argparse.Namespace) -> None:
    shards = args.out.parent / "shards" / "train"
    say_next(["data", "prepare", *input_words(args), "--tokenizer", args.out, "--out", shards])


class _Texts:
    """The texts of the inputs, once for each pass a trainer makes, with a progress bar and counts of the last pass."""

    def __init__(self, corpus: Corpus, pieces: list[Piece], reading: Reading, vocab_size: int, share: float) -> None:
        self._corpus, self._reading, self._vocab_size, self._share = corpus, reading, vocab_size, share
        from data_pipeline.sources.format import text_is_hidden

        self._total = None if any(map(text_is_hidden, pieces)) else sum(piece.size for piece in pieces)
        self._begin()

    def _begin(self) -> None:
        from data_pipeline.sources.tally import Tally

        self.counts = Tally(max_bad_fraction=self._share)
        self.progress = Progress("reading", self._total)

    def __iter__(self) -> Iterator[str]:
        from data_pipeline.sources.documents import iter_documents

        if self.counts.documents:
            self._begin()
        for document in iter_documents(self._corpus, self._reading, self.counts):
            self.progress.document(document)
            yield document.text
        self.progress.close()
        print(f"learning {self._vocab_size:,} tokens ...", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the progress bar down."""
        self.progress.close(whole=False)


def _same_training(info: Path, key: str, tokenizer_hash: str) -> bool:
    try:
        data = json.loads(info.read_bytes())
        return bool(data["key"] == key and data["tokenizer"] == tokenizer_hash)
    except (OSError, ValueError, KeyError, TypeError):
        return False
