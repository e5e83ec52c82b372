"""``nystrom data``: from text to shards."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from data_pipeline.inputs import expand_inputs, identify_inputs, total_text_bytes

if TYPE_CHECKING:
    from data_pipeline.manifest import FileEntry
    from data_pipeline.prepare import UnitResult
    from data_pipeline.sources import Document

DESCRIPTION = """Turn text into what training reads: collect documents, train a tokenizer, write checksummed shards of
tokens.

Text comes from JSONL (.jsonl, .jsonl.gz: one record a line), Parquet (.parquet) and plain text (.txt: a file is a
document)."""
EXAMPLE = """example, from nothing to shards:
  nystrom data stdlib    --out corpus
  nystrom data tokenizer --input corpus/train.jsonl --vocab-size 8192 --out tokenizer
  nystrom data prepare   --input corpus/train.jsonl --tokenizer tokenizer --out shards/train
  nystrom data inspect   shards/train

`nystrom data COMMAND --help` explains one command."""
INFO_FILE = "tokenizer_info.json"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.required:
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The options of ``nystrom data``."""
    parser = argparse.ArgumentParser(
        prog="nystrom data", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=_HelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=summary, epilog=f"example:\n  {example}", formatter_class=_HelpFormatter
        )

    stdlib = command(
        "stdlib",
        "collect this Python's own standard library (source and documentation) as a small corpus, without a download",
        "nystrom data stdlib --out corpus",
    )
    stdlib.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSONL files")

    tokenizer = command(
        "tokenizer",
        "train a byte-level BPE tokenizer on text",
        "nystrom data tokenizer --input 'books/*.txt' --vocab-size 16384 --out tokenizer",
    )
    _add_inputs(tokenizer)
    tokenizer.add_argument(
        "--vocab-size", type=int, default=32768, metavar="N", help="tokens, with the 256 bytes and 5 special tokens"
    )
    tokenizer.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tokenizer.json")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace another tokenizer that is there")

    prepare = command(
        "prepare",
        "tokenize text into a folder of shards; after an interruption the same command goes on where it stopped",
        "nystrom data prepare --input 'books/*.txt' --tokenizer tokenizer --out shards/train",
    )
    _add_inputs(prepare)
    prepare.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards, new or empty")
    prepare.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 27,
        metavar="N",
        help="a shard ends with the document that reaches this",
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace other shards that are there")

    verify = command(
        "verify",
        "read every byte of a shard folder and compare it with its checksums",
        "nystrom data verify shards/train",
    )
    verify.add_argument("shards", type=Path, metavar="DIR", help="shard folder")

    inspect = command("inspect", "say what a shard folder holds", "nystrom data inspect shards/train")
    inspect.add_argument("shards", type=Path, metavar="DIR", help="shard folder")
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="extend",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders (searched to any depth) or quoted patterns such as 'data/**/*.parquet'; may be repeated",
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="field of JSONL or column of Parquet with the text"
    )


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run one command; raises :class:`UserError` for the user's mistakes."""
    args = build_parser().parse_args(argv)
    run = {
        "stdlib": _stdlib,
        "tokenizer": _tokenizer,
        "prepare": _prepare,
        "verify": _verify,
        "inspect": _inspect,
    }[args.command]
    return run(args)


def _stdlib(args: argparse.Namespace) -> None:
    from data_pipeline.builtin import write_stdlib_corpus

    corpus = write_stdlib_corpus(args.out)
    print(f"{corpus.folder}: " + ("written" if corpus.changed else "already there, unchanged"))
    for name, documents in corpus.documents.items():
        print(f"  {name:<20} {documents:>6,} documents  {corpus.bytes[name] / 1e6:>7.2f} MB")
    classes = ", ".join(f"{label} ({count})" for label, count in corpus.labels.items())
    print(f"  classes of classify-*.jsonl, with their modules: {classes}")


class _Progress:
    """A progress bar over the text that passes, and the numbers for the closing line."""

    def __init__(self, description: str, total: int | None) -> None:
        from tqdm import tqdm

        self.started = time.monotonic()
        self.documents = 0
        self.text_bytes = 0
        self._bar = tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=None)

    def document(self, document: Document) -> None:
        """Count a document."""
        self.documents += 1
        self.text_bytes += document.size
        self._bar.update(document.size)
        if self.documents % 64 == 0:
            self._bar.set_postfix_str(f"{self.documents:,} documents", refresh=False)

    def reused(self, result: UnitResult) -> None:
        """Move past a unit that an earlier run finished."""
        self._bar.initial += result.text_bytes
        self._bar.n += result.text_bytes

    def close(self, whole: bool = True) -> None:
        """Take the bar down; after a whole pass it stands at its end (JSON's own characters are no text)."""
        if whole and self._bar.total is not None:
            self._bar.total = self._bar.n
        self._bar.close()

    def speed(self) -> str:
        """Seconds and MB/s so far."""
        seconds = time.monotonic() - self.started
        return f"{seconds:.1f} s, {self.text_bytes / 1e6 / max(seconds, 1e-9):.2f} MB/s"


def _tokenizer(args: argparse.Namespace) -> None:
    from data_pipeline.files import write_atomic
    from data_pipeline.sources import Counts, iter_documents
    from data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer, check_vocab_size, train_tokenizer

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
    progress = _Progress("reading", total_text_bytes(paths))

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
        f"{_documents(counts.documents, counts.empty)}, {counts.text_bytes / 1e6:.2f} MB of text in {progress.speed()}"
    )


def _same_training(info: Path, key: str, tokenizer_hash: str) -> bool:
    try:
        data = json.loads(info.read_bytes())
        return bool(data["key"] == key and data["tokenizer"] == tokenizer_hash)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _prepare(args: argparse.Namespace) -> None:
    from data_pipeline.prepare import plan_preparation, prepare
    from data_pipeline.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    preparation = plan_preparation(args.input, tokenizer, text_field=args.text_field, shard_tokens=args.shard_tokens)
    progress = _Progress("tokenizing", total_text_bytes(preparation.paths))
    whole = False
    try:
        outcome = prepare(
            preparation, args.out, overwrite=args.overwrite, on_document=progress.document, on_reused=progress.reused
        )
        whole = not outcome.already_complete
    finally:
        progress.close(whole)
    shards, manifest = outcome.shards, outcome.shards.manifest
    contents = (
        f"{_documents(shards.num_documents, manifest.empty_documents)}, {shards.num_tokens:,} tokens "
        f"({manifest.dtype}, {len(manifest.shards)} shard(s))"
    )
    if outcome.already_complete:
        print(f"{args.out}: already complete with these inputs and settings, nothing to do: {contents}")
        return
    again = (
        f"; {outcome.units_reused} of {len(preparation.units)} parts were done before" if outcome.units_reused else ""
    )
    print(f"{args.out}: {contents} from {manifest.text_bytes / 1e6:.2f} MB of text in {progress.speed()}{again}")


def _documents(documents: int, empty: int) -> str:
    return f"{documents:,} documents" + (f" ({empty:,} without text skipped)" if empty else "")


def _verify(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from data_pipeline.manifest import read_manifest
    from data_pipeline.verify import verify_shards

    files = read_manifest(args.shards).files()
    size = sum(entry.bytes for entry in files)
    started = time.monotonic()
    with tqdm(desc="verifying", total=size, unit="B", unit_scale=True, disable=None) as bar:

        def advance(entry: FileEntry) -> None:
            bar.update(entry.bytes)

        faults = verify_shards(args.shards, advance)
    if faults:
        raise UserError(f"{args.shards} is damaged, {len(faults)} fault(s):\n  " + "\n  ".join(faults))
    seconds = time.monotonic() - started
    print(f"{args.shards}: {len(files) + 1} files, {size / 1e6:.2f} MB, all as the manifest says ({seconds:.1f} s)")


def _inspect(args: argparse.Namespace) -> None:
    from data_pipeline.shards import ShardSet
    from data_pipeline.summary import summarise

    shards = ShardSet.open(args.shards)
    manifest, summary, tokenizer = shards.manifest, summarise(shards), shards.tokenizer()
    rows = [
        ("tokens", f"{summary.tokens:,} ({manifest.dtype}, {len(manifest.shards)} shard(s))"),
        ("documents", f"{_documents(summary.documents, manifest.empty_documents)} from {len(manifest.inputs)} file(s)"),
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
