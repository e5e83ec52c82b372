"""``nystrom data prepare``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.cli.common import (
    Progress,
    add_bad_fraction,
    add_inputs,
    bad_fraction_of,
    corpus_of,
    counted,
    other_kinds,
    reading_of,
    shard_facts,
)
from data_pipeline.console import add_json, print_json, say_next
from data_pipeline.errors import UserError
from data_pipeline.units import format_bytes

if TYPE_CHECKING:
    from data_pipeline.prepare.run import PrepareOptions, PrepareResult

SUMMARY = "tokenize text into a folder of shards; after an interruption the same command resumes it"
EXAMPLE = "nystrom data prepare --input 'books/*.txt' --tokenizer tokenizer --out shards/train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_inputs(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards, new or empty")
    parser.add_argument(
        "--source-field",
        metavar="NAME",
        help="field or column that says where a record is from, kept with each document; left out: the file's name",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other shards that are there")
    add_json(parser)

    chosen = parser.add_argument_group("which documents are kept")
    chosen.add_argument(
        "--filter",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME[=VALUE]",
        help="keep only documents that pass, such as gopher-quality, min-chars=200, script=latin:0.8; "
        "--list-filters explains all",
    )
    chosen.add_argument("--list-filters", action=_ListFilters, help="list the filters with their sources, and exit")
    chosen.add_argument(
        "--dedup",
        metavar="KIND",
        help="drop duplicates: exact, or near, near:threshold=0.8 (MinHash); the text is then read twice",
    )
    add_bad_fraction(chosen, "; samples are kept in bad_records.jsonl")

    work = parser.add_argument_group("how the work is done (the result is the same, byte for byte)")
    work.add_argument("--workers", type=int, metavar="N", help="processes; left out: one for each core")
    work.add_argument(
        "--backend",
        choices=["auto", "tokenizers", "tiktoken"],
        default="auto",
        help="what encodes; auto takes tiktoken for byte-level BPE if it gives identical ids on a sample of this text",
    )
    work.add_argument(
        "--shard-index", type=int, metavar="I", help="do part I of --num-shards only, as a job of an array"
    )
    work.add_argument(
        "--num-shards",
        type=int,
        metavar="K",
        help="number of jobs that share the folder; when all have ended the same command without these two finishes it",
    )
    work.add_argument(
        "--ray", nargs="?", const="auto", metavar="ADDRESS", help="spread the work over a Ray cluster (default: auto)"
    )
    work.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 27,
        metavar="N",
        help="a shard ends with the document that reaches this (this one does decide the files)",
    )


class _ListFilters(argparse.Action):
    """Prints the filters and exits, as --help does."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help, default=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from data_pipeline.quality.filters import Filters

        for name, default, description, source in Filters.known():
            print(f"{name}={default}" if default else name)
            print(f"    {description}" + (f" ({source})" if source else ""))
        print("Gopher: Rae et al. 2021; C4: Raffel et al. 2020; FineWeb: Penedo et al. 2024")
        parser.exit()


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.prepare.plan import Settings, plan_preparation, plan_stdin
    from data_pipeline.prepare.run import prepare
    from data_pipeline.quality.duplicates import Dedup
    from data_pipeline.quality.filters import Filters
    from data_pipeline.tokenization.sentencepiece import note
    from data_pipeline.tokenization.tokenizer import Tokenizer

    how = _how(args)
    settings = Settings(
        reading=reading_of(args),
        filters=Filters.parse(args.filter),
        dedup=Dedup.parse(args.dedup) if args.dedup else None,
        shard_tokens=args.shard_tokens,
    )
    corpus = corpus_of(args, args.out)
    if corpus is None and sys.stdin is None:
        raise UserError("--input - reads standard input, which is closed: give it the text (< FILE, or a pipe)")
    if args.overwrite and _folder_of(args.tokenizer) == args.out.resolve():
        raise UserError(
            f"--overwrite would remove the tokenizer {args.tokenizer} with the shards: choose another --out, or copy "
            "the tokenizer first"
        )
    tokenizer = Tokenizer.load(args.tokenizer)
    if corpus is None:
        preparation = plan_stdin(args.stdin_format, tokenizer, settings)
    else:
        preparation = plan_preparation(corpus, tokenizer, settings)
    progress = Progress("tokenizing", preparation.text_bytes)
    if (told := note(args.tokenizer)) is not None:
        progress.note(f"note: {told}")
    if (told := other_kinds(corpus)) is not None:
        progress.note(told)
    whole = False
    try:
        outcome = prepare(
            preparation,
            args.out,
            how,
            stream=sys.stdin.buffer if corpus is None else None,
            on_text=progress.text,
            on_phase=progress.phase,
            on_loss=lambda found: progress.note(f"note: {found}"),
        )
        whole = not outcome.already_complete
    finally:
        progress.close(whole)
    if args.json:
        print_json(_facts(args.out, outcome))
        return
    _tell(args.out, outcome, how, progress)
    if outcome.shards is not None:
        say_next(["data", "inspect", args.out])


def _facts(out: Path, outcome: PrepareResult) -> dict[str, Any]:
    """What was written; of a part of an array, which leaves no shard folder yet, its share of the work."""
    facts: dict[str, Any] = {"folder": out, "complete": outcome.shards is not None}
    if outcome.shards is not None:
        manifest = outcome.shards.manifest
        facts |= shard_facts(outcome.shards) | {
            "empty_documents": manifest.empty_documents,
            "bad_records": manifest.bad_records,
            "dropped_documents": manifest.dropped_documents,
            "reports": [out / report.name for report in manifest.reports],
        }
    return facts | {
        "already_complete": outcome.already_complete,
        "units": outcome.units,
        "units_reused": outcome.units_reused,
        "encoder": outcome.encoder,
    }


def _folder_of(tokenizer: Path) -> Path:
    path = tokenizer.resolve()
    return path if path.is_dir() else path.parent


def _how(args: argparse.Namespace) -> PrepareOptions:
    from data_pipeline.prepare.folder import JobPart
    from data_pipeline.prepare.run import PrepareOptions
    from data_pipeline.processes import available_cores

    if (args.shard_index is None) != (args.num_shards is None):
        raise UserError("--shard-index and --num-shards belong together: which part of how many")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}")
    return PrepareOptions(
        workers=args.workers or available_cores(),
        backend=args.backend,
        max_bad_fraction=bad_fraction_of(args),
        part=None if args.shard_index is None else JobPart(args.shard_index, args.num_shards),
        ray=args.ray,
        overwrite=args.overwrite,
    )


def _tell(out: Path, outcome: PrepareResult, how: PrepareOptions, progress: Progress) -> None:
    speed = progress.speed(outcome.text_bytes)
    if outcome.shards is None:
        assert how.part is not None
        part = f"part {how.part.index} of {how.part.count}"
        if outcome.signed_only:
            print(f"{out}: {part} has signed its documents; once all parts have, the same command tokenizes them")
        else:
            print(
                f"{out}: {part} is done, {outcome.units} units ({outcome.units_reused} of them before), "
                f"{format_bytes(outcome.text_bytes)} of text in {speed}; when all parts are, the command "
                "without --shard-index finishes the folder"
            )
        return
    shards, manifest = outcome.shards, outcome.shards.manifest
    contents = (
        f"{counted(shards.num_documents, manifest.empty_documents)}, {shards.num_tokens:,} tokens "
        f"({manifest.dtype}, {len(manifest.shards)} shard(s))"
    )
    if outcome.already_complete:
        print(f"{out}: already complete with these inputs and settings, nothing to do: {contents}")
        return
    again = (
        f"; {outcome.units_reused} of {outcome.units} units of work were done before" if outcome.units_reused else ""
    )
    took = f" in {speed}" if outcome.text_bytes else ""
    print(f"{out}: {contents} from {format_bytes(manifest.text_bytes)} of text{took}{again}")
    left_out = {"broken records skipped": manifest.bad_records, "documents dropped": manifest.dropped_documents}
    for what, counts in left_out.items():
        if counts:
            reasons = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            print(f"  {what}: {sum(counts.values()):,} ({reasons})")
    if manifest.reports:
        print(f"  samples of what was left out: {', '.join(str(out / report.name) for report in manifest.reports)}")
    print(f"  encoded by {outcome.encoder}")
    for reason in outcome.fell_back:
        print(f"  one unit was encoded again by tokenizers: {reason}")
