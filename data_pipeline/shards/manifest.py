"""The manifest of a shard folder: the only list of files that a reader trusts, with checksums, also of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline import __version__
from data_pipeline.errors import UserError
from data_pipeline.files import FileEntry, write_atomic

MANIFEST_FILE = "manifest.json"
FORMAT = "nystrom-shards"
FORMAT_VERSION = 2
BLOCK_BYTES = 4 << 20
"""Each block of a file has a checksum of its own: ``nystrom data verify`` says which one is damaged."""


@dataclass(frozen=True)
class ShardEntry:
    """A token file and the Arrow file that describes it."""

    unit: int
    num_tokens: int
    num_documents: int
    tokens: FileEntry
    index: FileEntry


@dataclass(frozen=True)
class InputEntry:
    """An input as it was read: name relative to the corpus, size, and a hash of its contents.

    ``digest`` is the XXH3-128 (hex) over the digests of the pieces that the input was cut into, in order.
    """

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a reader needs to know about a shard folder. No paths, no times: equal inputs and settings, equal bytes."""

    settings: dict[str, Any]  # everything besides inputs and tokenizer that decided the bytes
    num_tokens: int
    num_documents: int
    text_bytes: int  # UTF-8, of the documents that were tokenized
    empty_documents: int  # null, white space only or without a token, skipped
    bad_records: dict[str, int]  # what was wrong -> how many, skipped
    dropped_documents: dict[str, int]  # filter, or "duplicate" -> how many
    dtype: str
    vocab_size: int
    tokenizer_hash: str
    special_ids: dict[str, int]  # role (bos, pad, eos, unk, mask) -> id; pad and eos always, the others if they exist
    other_special_ids: tuple[int, ...]  # special tokens without a role
    tokenizer: tuple[FileEntry, ...]
    reports: tuple[FileEntry, ...]  # samples of what was left out, if anything was
    shards: tuple[ShardEntry, ...]
    inputs: tuple[InputEntry, ...]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    block_bytes: int = BLOCK_BYTES
    code_version: str = field(default=__version__)

    @property
    def fingerprint(self) -> str:
        """XXH3-128 (hex) of the manifest's contents, thereby of every file it lists."""
        return xxhash.xxh3_128_hexdigest(_dump(asdict(self)))

    def files(self) -> list[FileEntry]:
        """All files of the folder besides the manifest."""
        out = [*self.tokenizer, *self.reports]
        for shard in self.shards:
            out += [shard.tokens, shard.index]
        return out

    def to_bytes(self) -> bytes:
        """The file's contents."""
        return _dump({"fingerprint": self.fingerprint, **asdict(self)})

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically: from then on the folder is complete."""
        write_atomic(folder / MANIFEST_FILE, self.to_bytes())


def _dump(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``; raises :class:`UserError` if missing, damaged or of another version."""
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise UserError(f"shard folder {folder} does not exist; `nystrom data prepare` writes one")
    if not path.is_file():
        raise UserError(
            f"{folder} has no {MANIFEST_FILE}: it is not a shard folder, or `nystrom data prepare` has not finished "
            "there (run the same command again)"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        data = json.loads(raw)
        if data["format"] != FORMAT:
            raise UserError(f"{path} is not a manifest of shards (format {data['format']!r})")
        version = data["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: it is not the JSON of a manifest") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this program reads version {FORMAT_VERSION}: prepare the text again"
        )
    try:
        fingerprint = data.pop("fingerprint")
        manifest = Manifest(
            **{
                **data,
                "tokenizer": tuple(_file(entry) for entry in data["tokenizer"]),
                "reports": tuple(_file(entry) for entry in data["reports"]),
                "other_special_ids": tuple(data["other_special_ids"]),
                "shards": tuple(parse_shard(entry) for entry in data["shards"]),
                "inputs": tuple(InputEntry(**entry) for entry in data["inputs"]),
            }
        )
        # Comparing with the canonical spelling finds a change anywhere in the file, white space included.
        whole = manifest.fingerprint == fingerprint and manifest.to_bytes() == raw
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not whole:
        raise UserError(f"{path} is damaged: its contents do not match its own fingerprint")
    return manifest


def _file(entry: dict[str, Any]) -> FileEntry:
    return FileEntry(**{**entry, "blocks": tuple(entry["blocks"])})


def parse_shard(entry: dict[str, Any]) -> ShardEntry:
    """Inverse of ``asdict`` for a :class:`ShardEntry`."""
    return ShardEntry(**{**entry, "tokens": _file(entry["tokens"]), "index": _file(entry["index"])})
