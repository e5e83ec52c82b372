"""``nystrom data verify``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from data_pipeline.units import format_bytes

if TYPE_CHECKING:
    from data_pipeline.files import FileEntry

SUMMARY = "read every byte of a shard folder and compare it with its checksums"
EXAMPLE = "nystrom data verify shards/train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("shards", type=Path, metavar="DIR", help="shard folder")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from tqdm import tqdm

    from data_pipeline.shards.manifest import read_manifest
    from data_pipeline.shards.shardset import verify_shards

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
    print(f"{args.shards}: {len(files) + 1} files, {format_bytes(size)}, all as the manifest says ({seconds:.1f} s)")
