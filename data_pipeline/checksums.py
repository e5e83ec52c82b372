"""Files with their sizes and checksums, as the manifests of shard folders and of checkpoints list them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

_CHUNK = 4 << 20


@dataclass(frozen=True)
class FileEntry:
    """A file of a folder: its name relative to the folder, its size, and hashes (hex) of its contents.

    ``xxh3_128`` is of the whole file, ``blocks`` are the XXH3-64 of its blocks, empty where no block size was given.
    """

    name: str
    bytes: int
    xxh3_128: str
    blocks: tuple[str, ...] = ()


class FileHasher:
    """Hashes a stream of bytes as a whole, and by blocks of ``block_bytes`` unless that is None."""

    def __init__(self, block_bytes: int | None = None) -> None:
        self.bytes = 0
        self._whole = xxhash.xxh3_128()
        self._block_bytes = block_bytes
        self._block = xxhash.xxh3_64()
        self._blocks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        """Append ``data`` to the stream."""
        self._whole.update(data)
        view = memoryview(data).cast("B")
        if self._block_bytes is None:
            self.bytes += len(view)
            return
        while len(view):
            part = view[: self._block_bytes - self.bytes % self._block_bytes]
            self._block.update(part)
            self.bytes += len(part)
            view = view[len(part) :]
            if self.bytes % self._block_bytes == 0:
                self._blocks.append(self._block.hexdigest())
                self._block = xxhash.xxh3_64()

    def entry(self, name: str) -> FileEntry:
        """The entry of the stream so far, under this name."""
        blocks = list(self._blocks)
        if self._block_bytes is not None and self.bytes % self._block_bytes:
            blocks.append(self._block.hexdigest())
        return FileEntry(name, self.bytes, self._whole.hexdigest(), tuple(blocks))


def hash_stream(stream: BinaryIO, name: str, block_bytes: int | None = None) -> FileEntry:
    """Hash an open binary file from its position to its end."""
    hasher = FileHasher(block_bytes)
    while data := stream.read(_CHUNK):
        hasher.update(data)
    return hasher.entry(name)


def hash_file(folder: Path, name: str, block_bytes: int | None = None) -> FileEntry:
    """Hash the file ``folder/name``. Raises ``OSError`` if it cannot be read."""
    with open(folder / name, "rb") as stream:
        return hash_stream(stream, name, block_bytes)
