"""Files that survive a crash (whole under their name, or not there at all), and files with their checksums."""

from __future__ import annotations

import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from data_pipeline.errors import UserError

TMP_SUFFIX = ".tmp"
_CHUNK = 4 << 20


def write_atomic(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write ``data`` to ``path.tmp``, fsync, rename: a reader sees the old file or the new one, never half of one.

    ``shared``: several processes may be writing this file at once; each then writes to a temporary name of its own.
    A write that fails (a full disk) leaves no temporary file.
    """
    tmp = path.with_name(path.name + (f".{secrets.token_hex(4)}" if shared else "") + TMP_SUFFIX)
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except OSError:
        tmp.unlink(missing_ok=True)
        raise
    publish(tmp, path)


def check_writable(path: Path) -> None:
    """Raise :class:`UserError` unless a file ``path`` could be written, its folders made: before hours of work."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {folder}: {error.strerror}") from None


def publish(tmp: Path, path: Path) -> None:
    """Rename a finished, fsynced file to its name and make the rename itself durable."""
    os.replace(tmp, path)
    fsync_folder(path.parent)


def apply_umask(path: Path) -> None:
    """Give a new file the rights that ``open`` would have given it: safetensors makes files that only we can read."""
    try:
        status = Path("/proc/self/status").read_text()
        umask = int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration):  # not Linux: the only way to read it is to set it
        umask = os.umask(0o077)
        os.umask(umask)
    path.chmod(0o666 & ~umask)


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class FileEntry:
    """A file as the manifests of shard folders and checkpoints list it: name, size, and hashes (hex) of its contents.

    The name is relative to the folder. ``xxh3_128`` is of the whole file. ``blocks`` are the XXH3-64 of its blocks, and
    empty where no block size was given.
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
