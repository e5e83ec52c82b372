"""What the commands of ``nystrom data`` share: the options for inputs, the progress bar."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.units import format_bytes

if TYPE_CHECKING:
    from data_pipeline.shards.shardset import ShardSet
    from data_pipeline.sources.corpus import Corpus
    from data_pipeline.sources.documents import Document
    from data_pipeline.sources.reading import Reading


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The options that say where text comes from and what a document is."""
    from data_pipeline.sources.format import stream_formats

    where = parser.add_argument_group("where the text comes from (one of --input and --dataset)")
    where.add_argument(
        "--input",
        action="extend",
        nargs="+",
        metavar="PATH",
        help="files, folders (searched to any depth), quoted patterns ('data/**/*.parquet'), or - for standard input",
    )
    where.add_argument(
        "--stdin-format", choices=stream_formats(), default="lines", help="what comes in when --input is -"
    )
    where.add_argument("--dataset", metavar="ID", help="a dataset of the Hugging Face hub, streamed")
    where.add_argument("--config", metavar="NAME", help="configuration of --dataset")
    where.add_argument(
        "--split", default="train", metavar="NAME", help="split of --dataset, or several: train+unsupervised"
    )
    where.add_argument("--revision", metavar="REV", help="commit, branch or tag of --dataset")

    what = parser.add_argument_group("what a document is")
    what.add_argument(
        "--text-field", default="text", metavar="NAME", help="field of JSONL, column of Parquet and CSV with the text"
    )
    what.add_argument(
        "--template", metavar="T", help=r"text made of several fields, such as '{title}\n\n{body}', instead of one"
    )
    what.add_argument(
        "--text-unit", choices=["file", "line"], default="file", help="what a document is in plain text files"
    )
    add_quotes(what)
    what.add_argument(
        "--normalize",
        choices=["nfc", "nfd", "nfkc", "nfkd"],
        help="Unicode normalisation; left out: text is kept as it is",
    )


def add_quotes(parser: argparse._ActionsContainer) -> None:
    """The option that says what double quotes are in CSV and TSV."""
    parser.add_argument(
        "--quotes",
        choices=["auto", "csv", "none"],
        default="auto",
        help="double quotes in CSV and TSV: csv, they enclose fields (RFC 4180); none, they are text; auto is csv for "
        "CSV and none for TSV",
    )


def add_bad_fraction(parser: argparse._ActionsContainer, kept: str = "") -> None:
    """The option that says how many broken records are skipped; ``kept`` says more of what becomes of them."""
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.001,
        metavar="F",
        help=f"stop when more than this share of the records is broken; broken records are skipped and counted{kept}",
    )


def bad_fraction_of(args: argparse.Namespace) -> float:
    """That share; raises :class:`UserError` for one that is none."""
    share: float = args.max_bad_fraction
    if not 0 <= share <= 1:
        raise UserError(f"--max-bad-fraction is a share between 0 and 1, got {share}")
    return share


def reading_of(args: argparse.Namespace) -> Reading:
    """What the options say about documents."""
    from data_pipeline.sources.reading import Reading

    source_field = getattr(args, "source_field", None)  # of the commands that keep it
    return Reading(args.text_field, args.template, args.text_unit, args.normalize, args.quotes, source_field)


def corpus_of(args: argparse.Namespace, out: Path | None = None) -> Corpus | None:
    """What the options say about inputs, None for standard input; raises :class:`UserError` for none and for both.

    What folders and patterns find in ``out``, where this program writes, is left out.
    """
    from data_pipeline.sources.corpus import open_corpus, open_dataset

    if bool(args.input) == bool(args.dataset):
        raise UserError("say where the text comes from: either --input or --dataset")
    if args.dataset:
        return open_dataset(args.dataset, args.config, args.split, args.revision)
    if "-" not in args.input:
        return open_corpus(args.input, out)
    if len(args.input) > 1:
        raise UserError("--input - (standard input) cannot be mixed with files")
    return None


def other_kinds(corpus: Corpus | None) -> str | None:
    """What to say of files in the inputs' folders and patterns whose kind is not read; None if there are none."""
    paths = () if corpus is None else corpus.passed_over
    if not paths:
        return None
    endings = Counter(path.suffix.lower() or "no ending" for path in paths)
    counts = ", ".join(f"{ending} {count:,}" for ending, count in endings.most_common(8))
    more = ", ..." if len(endings) > 8 else ""
    return (
        f"note: {len(paths):,} file(s) are left out, of kinds that are not read ({counts}{more}); the first: {paths[0]}"
    )


def input_words(args: argparse.Namespace) -> list[str]:
    """The options of :func:`add_inputs` as they were given, for another command that reads the same text."""
    parser = argparse.ArgumentParser(add_help=False)
    add_inputs(parser)
    words: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest)
        if value != action.default:
            words += [action.option_strings[0], *(value if isinstance(value, list) else [value])]
    return words


def shard_facts(shards: ShardSet) -> dict[str, Any]:
    """A shard folder as ``--json`` has it, in the words of ``nystrom data inspect --json``."""
    manifest = shards.manifest
    return {
        "folder": str(shards.path),
        "documents": manifest.num_documents,
        "tokens": manifest.num_tokens,
        "text_bytes": manifest.text_bytes or None,  # of imported tokens nobody has seen the text
        "bytes": sum(entry.bytes for entry in manifest.files()),
        "shards": len(manifest.shards),
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "tokenizer_hash": manifest.tokenizer_hash,
        "fingerprint": manifest.fingerprint,
    }


class Progress:
    """A progress bar over the text that passes, and the numbers for the closing line."""

    def __init__(self, description: str, total: int | None) -> None:
        from data_pipeline.bars import Lines, progress_bar

        self.started = time.monotonic()
        self.text_bytes = 0
        self._bar = progress_bar(desc=description, total=total, unit="B", unit_scale=True)
        self._lines = Lines(description, total, "B") if self._bar.disable else None

    def text(self, size: int) -> None:
        """Count bytes of text."""
        self.text_bytes += size
        self._bar.update(size)
        if self._lines is not None:
            self._lines.update(size)

    def document(self, document: Document) -> None:
        """Count a document."""
        self.text(document.size)

    def phase(self, name: str) -> None:
        """Begin another pass over the text."""
        from data_pipeline.bars import Lines

        self.text_bytes = 0
        if self._lines is not None and name != self._lines.title:
            self._lines = Lines(name, self._lines.total, "B")
        self._bar.reset()
        self._bar.set_description(name)

    def note(self, text: str) -> None:
        """A line on standard error, above the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self, whole: bool = True) -> None:
        """Take the bar down; after a whole pass it stands at its end (JSON's own characters are no text)."""
        if whole and self._bar.total is not None:
            self._bar.total = self._bar.n
        self._bar.close()

    def speed(self, text_bytes: int | None = None) -> str:
        """Seconds, and text a second, so far; ``text_bytes``: of so many of the bytes."""
        seconds = time.monotonic() - self.started
        size = self.text_bytes if text_bytes is None else text_bytes
        return f"{seconds:.1f} s, {format_bytes(size / max(seconds, 1e-9))}/s"


def counted(documents: int, empty: int) -> str:
    """Documents, and how many were skipped for want of text."""
    return f"{documents:,} documents" + (f" ({empty:,} without text skipped)" if empty else "")
