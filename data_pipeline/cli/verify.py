"""``nystrom data verify``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.console import add_json, print_json, say_next
from data_pipeline.errors import UserError
from data_pipeline.units import format_bytes

if TYPE_CHECKING:
    from data_pipeline.files import FileEntry

SUMMARY = "read every byte of a shard folder and compare it with its checksums"
EXAMPLE = "nystrom data verify shards/train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("shards", type=Path, metavar="DIR", help="shard folder")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.bars import counting
    from data_pipeline.shards.manifest import read_manifest
    from data_pipeline.shards.shardset import verify_shards

    manifest = read_manifest(args.shards)
    files = manifest.files()
    size = sum(entry.bytes for entry in files)
    started = time.monotonic()
    with counting("verifying", size, "B") as update:

        def advance(entry: FileEntry) -> None:
            update(entry.bytes)

        faults = verify_shards(args.shards, advance)
    if faults:
        raise UserError(f"{args.shards} is damaged, {len(faults)} fault(s):\n  " + "\n  ".join(faults))
    seconds = time.monotonic() - started
    if args.json:
        found = {"folder": args.shards, "files": len(files) + 1, "bytes": size, "fingerprint": manifest.fingerprint}
        print_json(found | {"intact": True, "seconds": seconds})
        return
    print(f"{args.shards}: {len(files) + 1} files, {format_bytes(size)}, all as the manifest says ({seconds:.1f} s)")
    say_next(["data", "inspect", args.shards])
