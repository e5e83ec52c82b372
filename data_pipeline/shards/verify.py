"""Checking a shard folder against its manifest, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.checksums import FileEntry, hash_file
from data_pipeline.errors import UserError
from data_pipeline.shards.manifest import read_manifest
from data_pipeline.shards.shardset import ShardSet, check_size


def verify_shards(folder: str | Path, on_file: Callable[[FileEntry], None] = lambda entry: None) -> list[str]:
    """Read every file of a shard folder and compare it with the manifest.

    Returns one line for each fault (file, 4 MiB block, byte range), none if the folder is whole. ``on_file`` is called
    after each file. Raises :class:`UserError` if the manifest itself is missing or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    faults: list[str] = []
    for entry in manifest.files():
        try:
            check_size(folder, entry)
            faults += _compare(folder, entry, manifest.block_bytes)
        except UserError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{folder / entry.name} cannot be read: {error.strerror}")
        on_file(entry)
    return faults or _cross_check(folder)


def _compare(folder: Path, entry: FileEntry, block_bytes: int) -> list[str]:
    found = hash_file(folder, entry.name, block_bytes)
    if found == entry:
        return []
    bad = [i for i, (a, b) in enumerate(zip(found.blocks, entry.blocks, strict=False)) if a != b]
    return [
        f"{folder / entry.name}, block {i} (bytes {i * block_bytes} to {min(entry.bytes, (i + 1) * block_bytes) - 1}): "
        "contents do not match the manifest"
        for i in bad
    ] or [f"{folder / entry.name}: contents do not match the manifest"]


def _cross_check(folder: Path) -> list[str]:
    """Do the files, each as it was written, agree with each other?"""
    shards = ShardSet.open(folder)
    shards.tokenizer()
    faults = []
    for shard, ends in ((shard, shards.document_ends(shard.index)) for shard in shards.manifest.shards):
        rising = bool(np.all(ends[1:] > ends[:-1]))
        if len(ends) != shard.num_documents or not rising or int(ends[-1]) != shard.num_tokens:
            faults.append(f"{folder / shard.index.name}: document ends do not fit {shard.tokens.name}")
    return faults
