"""``nystrom data prepare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.cli.common import Progress, add_inputs, counted
from data_pipeline.sources.inputs import total_text_bytes

SUMMARY = "tokenize text into a folder of shards; after an interruption the same command goes on where it stopped"
EXAMPLE = "nystrom data prepare --input 'books/*.txt' --tokenizer tokenizer --out shards/train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_inputs(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards, new or empty")
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 27,
        metavar="N",
        help="a shard ends with the document that reaches this",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other shards that are there")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.prepare.run import plan_preparation, prepare
    from data_pipeline.tokenization.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    preparation = plan_preparation(args.input, tokenizer, text_field=args.text_field, shard_tokens=args.shard_tokens)
    progress = Progress("tokenizing", total_text_bytes(preparation.paths))
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
        f"{counted(shards.num_documents, manifest.empty_documents)}, {shards.num_tokens:,} tokens "
        f"({manifest.dtype}, {len(manifest.shards)} shard(s))"
    )
    if outcome.already_complete:
        print(f"{args.out}: already complete with these inputs and settings, nothing to do: {contents}")
        return
    again = (
        f"; {outcome.units_reused} of {len(preparation.units)} parts were done before" if outcome.units_reused else ""
    )
    print(f"{args.out}: {contents} from {manifest.text_bytes / 1e6:.2f} MB of text in {progress.speed()}{again}")
