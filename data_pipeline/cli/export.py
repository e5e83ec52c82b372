"""``nystrom data export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.console import add_json, print_json
from data_pipeline.errors import UserError
from data_pipeline.units import format_bytes

SUMMARY = "write shards as Parquet files, or as Megatron-LM's .bin and .idx, and read them back"
EXAMPLE = "nystrom data export shards/train parquet/train --format parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="shard folder")
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="parquet: a folder, new or empty; megatron: the path without .bin and .idx",
    )
    parser.add_argument("--format", choices=("parquet", "megatron"), required=True, help="what is written")
    parser.add_argument("--text", action="store_true", help="parquet: a column with the decoded text besides the ids")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    parser.add_argument(
        "--file-tokens",
        type=int,
        default=1 << 27,
        metavar="N",
        help="parquet: a file ends with the row group that reaches this",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.bars import counting
    from data_pipeline.exchange.export import export_megatron, export_parquet
    from data_pipeline.shards.shardset import ShardSet

    if args.text and args.format != "parquet":
        raise UserError("--text is for --format parquet: Megatron-LM's files hold tokens only")
    shards = ShardSet.open(args.shards)
    with counting("exporting and reading back", 2 * shards.num_tokens, " tokens") as update:
        if args.format == "parquet":
            done = export_parquet(
                shards,
                args.out,
                text=args.text,
                overwrite=args.overwrite,
                file_tokens=args.file_tokens,
                on_tokens=update,
            )
        else:
            done = export_megatron(shards, args.out, overwrite=args.overwrite, on_tokens=update)
    total = sum(path.stat().st_size for path in done.files)
    if args.json:
        print_json(
            {
                "files": list(done.files),
                "format": args.format,
                "documents": done.documents,
                "tokens": done.tokens,
                "bytes": total,
                "ids_hash": done.ids_hash,
                "shards_fingerprint": shards.fingerprint,
            }
        )
        return
    size = format_bytes(total)
    shown = ", ".join(str(path) for path in done.files[:2]) + (", ..." if len(done.files) > 2 else "")
    print(f"{shown}: {len(done.files)} file(s), {size}")
    print(
        f"  verified: read back, {done.documents:,} documents and {done.tokens:,} tokens as in {args.shards} (ids, end "
        f"tokens included: {done.ids_hash[:12]})"
    )
