"""``nystrom data import``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.cli.common import Progress, shard_facts
from data_pipeline.console import add_json, print_json, say_next
from data_pipeline.errors import UserError
from data_pipeline.units import format_bytes

if TYPE_CHECKING:
    from data_pipeline.exchange.imports import ImportResult
    from data_pipeline.exchange.plan import ImportPlan

SUMMARY = "make shards of tokens that Megatron-LM (.bin, .idx) or datatrove (.ds) wrote, id for id"
_WORTH_PROCESSES = 1 << 28  # bytes of tokens: below, starting a process takes longer than it saves
EXAMPLE = "nystrom data import corpus_text_document --tokenizer tokenizer --out shards/train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".bin, .idx or the prefix of both, .ds, folders (searched to any depth), quoted patterns",
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="the tokenizer that the tokens were made with"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards, new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace other shards that are there")
    ends = parser.add_argument_group("where documents end")
    ends.add_argument(
        "--end-token",
        metavar="TOKEN",
        help="text or id of the token behind every document, or none; left out: the tokenizer's own end token, behind "
        "all documents or behind none. Shards have the tokenizer's own there",
    )
    ends.add_argument("--mixed-ends", action="store_true", help="some documents have the end token and some do not")
    trove = parser.add_argument_group("datatrove's files")
    trove.add_argument(
        "--token-size", type=int, choices=(2, 4), help="bytes of a token, where neither index nor metadata says it"
    )
    trove.add_argument("--ignore-loss", action="store_true", help="take tokens as targets that a .loss file masks")
    work = parser.add_argument_group("how the work is done")
    work.add_argument(
        "--workers", type=int, metavar="N", help="processes; left out: one for each core, and one for less than 256 MiB"
    )
    work.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 27,
        metavar="N",
        help="a shard ends with the document that reaches this (this one does decide the files)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.exchange.imports import import_tokens
    from data_pipeline.exchange.plan import plan_import
    from data_pipeline.exchange.tokenfile import TokenFormat
    from data_pipeline.processes import available_cores
    from data_pipeline.tokenization.tokenizer import Tokenizer

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}")
    if args.mixed_ends and args.end_token == "none":
        raise UserError("--mixed-ends and --end-token none: without an end token no document has one")
    if args.overwrite and args.tokenizer.resolve().is_relative_to(args.out.resolve()):
        raise UserError(f"--overwrite would remove the tokenizer {args.tokenizer} with the shards: copy it first")
    tokenizer = Tokenizer.load(args.tokenizer)
    plan = plan_import(
        args.sources,
        tokenizer,
        end_token=args.end_token,
        mixed_ends=args.mixed_ends,
        form=TokenFormat(args.token_size, ignore_loss=args.ignore_loss),
        shard_tokens=args.shard_tokens,
        without=args.out,
    )
    progress = Progress("importing", plan.text_bytes)
    whole = False
    try:
        result = import_tokens(
            plan,
            args.out,
            workers=args.workers or (available_cores() if plan.text_bytes > _WORTH_PROCESSES else 1),
            overwrite=args.overwrite,
            on_bytes=progress.text,
        )
        whole = not result.already_complete
    finally:
        progress.close(whole)
    if args.json:
        counts = {
            "already_complete": result.already_complete,
            "source_documents": None if result.already_complete else result.source_documents,
            "source_tokens": None if result.already_complete else result.source_tokens,
            "empty_documents": result.shards.manifest.empty_documents,
        }
        print_json(shard_facts(result.shards) | counts)
        return
    print("\n".join(_lines(args.out, plan, result, progress)))
    say_next(["data", "inspect", args.out])


def _lines(out: Path, plan: ImportPlan, result: ImportResult, progress: Progress) -> list[str]:
    manifest = result.shards.manifest
    contents = (
        f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens ({manifest.dtype}, "
        f"{len(manifest.shards)} shard(s))"
    )
    if result.already_complete:
        return [f"{out}: already complete with these inputs and settings, nothing to do: {contents}"]
    again = f"; {result.units_reused} of {result.units} units of work were done before" if result.units_reused else ""
    counted = "as the index says" if all(source.documents is not None for source in plan.sources) else "no index"
    lines = [
        f"{out}: {contents} from {format_bytes(result.token_bytes)} in {progress.speed(result.token_bytes)}{again}",
        f"  source: {result.source_documents:,} documents, {result.source_tokens:,} tokens, {counted}; "
        f"{manifest.empty_documents:,} without a token left out",
        f"  ends: {_ends(plan, result)}",
        "  verified: every id is in the vocabulary, and the shards read back give the ids of the source",
    ]
    if result.inner_ends:
        lines.append(f"  note: {result.inner_ends:,} end tokens stand inside documents, and were left there")
    return lines


def _ends(plan: ImportPlan, result: ImportResult) -> str:
    from data_pipeline.exchange.plan import ImportSettings

    assert isinstance(plan.settings, ImportSettings)
    tokenizer, end = plan.tokenizer, plan.settings.end_id
    own = f"{tokenizer.name_of(tokenizer.eos_id)!r} ({tokenizer.eos_id})"
    if end is None or not result.with_end:
        return f"no document had an end token, {own} was added to each"
    there = "the source" if result.without_end == 0 else f"{result.with_end:,} documents of the source"
    found = f"{there} ended in {tokenizer.name_of(end)!r} ({end})"
    if end != tokenizer.eos_id:
        return f"{found}, in the shards it is {own}"
    return found + (f"; {own} was added to the others" if result.without_end else "")
