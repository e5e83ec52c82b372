"""The last step of preparing: from the units' results to the manifest, and the check of a folder that has one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.files import FileEntry, hash_file, write_atomic
from data_pipeline.prepare.folder import BAD_FILE, DROPPED_FILE, occupied_error
from data_pipeline.prepare.plan import STDIN, STDIN_UNIT_BYTES, Preparation, Unit
from data_pipeline.prepare.worker import WORK, UnitResult, sum_counts
from data_pipeline.processes import available_cores
from data_pipeline.shards.manifest import BLOCK_BYTES, InputEntry, Manifest, read_manifest
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.shards.writer import remove_files, token_dtype, unit_of
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.streams import piece_digest, stdin_chunks
from data_pipeline.sources.tally import BadRecord, Tally
from data_pipeline.tokenization.tokenizer import TOKENIZER_FILES

_SAMPLES = 100  # of what was left out, kept for each reason


def complete(
    preparation: Preparation,
    folder: Path,
    results: Sequence[tuple[Unit, UnitResult]],
    divided: Mapping[int, str],
    max_bad_fraction: float,
) -> None:
    """Write the tokenizer, the reports and the manifest; from then on the folder is complete.

    ``results`` in the order of the units; ``divided``: the digest of the piece of each unit that was divided. Raises
    :class:`UserError` if there is no document in them, or too many records were broken.
    """
    _check_broken(results, max_bad_fraction)
    documents = sum(result.documents for _, result in results)
    empty = sum(result.empty for _, result in results)
    bad = sum_counts(result.bad for _, result in results)
    dropped = sum_counts(result.dropped for _, result in results)
    if not documents:
        _none_left(preparation, folder, empty, bad, dropped)
    tokenizer = preparation.tokenizer
    tokenizer.save(folder)
    reports = [
        _report(folder, BAD_FILE, [sample for _, result in results for sample in result.bad_samples]),
        _report(folder, DROPPED_FILE, [sample for _, result in results for sample in result.dropped_samples]),
    ]
    shards = tuple(shard for _, result in results for shard in result.shards)
    listed = {entry.name for shard in shards for entry in (shard.tokens, shard.index)}
    # Left by a unit that was larger before an input was mended.
    remove_files(folder, [p.name for p in folder.iterdir() if unit_of(p.name) is not None and p.name not in listed])
    special_ids = tokenizer.roles.as_dict()
    Manifest(
        settings=preparation.facts(),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=documents,
        text_bytes=sum(result.text_bytes for _, result in results),
        empty_documents=empty,
        bad_records=bad,
        dropped_documents=dropped,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        special_ids=special_ids,
        other_special_ids=tuple(sorted(set(tokenizer.special_ids) - set(special_ids.values()))),
        tokenizer=tuple(hash_file(folder, name, BLOCK_BYTES) for name in TOKENIZER_FILES),
        reports=tuple(report for report in reports if report is not None),
        shards=shards,
        inputs=_inputs(preparation, results, divided),
    ).write(folder)


def _inputs(
    preparation: Preparation, results: Sequence[tuple[Unit, UnitResult]], divided: Mapping[int, str]
) -> tuple[InputEntry, ...]:
    pieces = [
        (piece, found)
        for unit, result in results
        if not unit.part  # of a divided unit the first part stands for all
        for piece, found in zip(
            unit.pieces, result.digests if unit.part is None else [divided[unit.number]], strict=True
        )
    ]
    return input_entries(preparation, pieces)


def input_entries(preparation: Preparation, pieces: Iterable[tuple[Piece, str]]) -> tuple[InputEntry, ...]:
    """What the manifest says of the inputs, from the digests of all their pieces in order."""
    digests: dict[str, list[str]] = {name: [] for name in preparation.names}
    sizes = {file.name: file.bytes for file in preparation.files}
    for piece, found in pieces:
        digests.setdefault(piece.name, []).append(found)
        if piece.name == STDIN:
            sizes[STDIN] = sizes.get(STDIN, 0) + piece.size
    return tuple(
        InputEntry(name, sizes.get(name, 0), xxhash.xxh3_128_hexdigest("".join(found).encode()))
        for name, found in digests.items()
    )


def _check_broken(results: Sequence[tuple[Unit, UnitResult]], max_bad_fraction: float) -> None:
    """Judge the share of broken records over all units."""
    places = {piece.name: piece.location for unit, _ in results for piece in unit.pieces if piece.name != STDIN}
    Tally(
        max_bad_fraction,
        records=sum(result.records for _, result in results),
        bad=Counter(sum_counts(result.bad for _, result in results)),
        bad_samples=[BadRecord(**sample) for _, result in results for sample in result.bad_samples],
        locations=places,
    ).check()


def _none_left(
    preparation: Preparation, folder: Path, empty: int, bad: dict[str, int], dropped: dict[str, int]
) -> None:
    remove_files(folder / WORK, [p.name for p in (folder / WORK).iterdir() if p.name.startswith("unit-")])
    seen = [f"{empty} without text"] if empty else []
    seen += [f"{count} {name}" for name, count in bad.items()]
    seen += [f"{count} dropped by {name}" for name, count in dropped.items()]
    found = f"nothing but records that were left out ({', '.join(seen)})" if seen else "no records"
    raise UserError(f"no documents: {preparation.description} holds {found}")


def _report(folder: Path, name: str, samples: Iterable[dict[str, Any]]) -> FileEntry | None:
    """Write the first samples of each reason as JSONL; no file if there are none."""
    counts: dict[str, int] = {}
    lines = []
    for sample in samples:
        count = counts.get(sample["reason"], 0) + 1
        counts[sample["reason"]] = count
        if count <= _SAMPLES:
            lines.append(json.dumps(sample, ensure_ascii=False, sort_keys=True) + "\n")
    remove_files(folder, [name])
    if not lines:
        return None
    write_atomic(folder / name, "".join(lines).encode("utf-8", "replace"))
    return hash_file(folder, name, BLOCK_BYTES)


def check_complete(preparation: Preparation, folder: Path, stream: BinaryIO | None) -> ShardSet:
    """Open a folder that has a manifest if it was made from these inputs with these settings.

    The inputs are read and hashed, many times as fast as they were tokenized. Raises :class:`UserError` that says what
    differs.
    """
    manifest = read_manifest(folder)
    tokenizer = preparation.tokenizer
    if manifest.tokenizer_hash != tokenizer.hash:
        raise occupied_error(folder, f"shards of another tokenizer (hash {manifest.tokenizer_hash[:12]})")
    for name, old, new in _differences(manifest.settings, preparation.facts()):
        raise occupied_error(folder, f"shards made with another {name}: {old}, now {new}")
    names = [entry.name for entry in manifest.inputs]
    if names != list(preparation.names):
        raise occupied_error(
            folder, f"shards of other inputs ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        )
    known = {file.name: file.bytes for file in preparation.files}
    for entry in manifest.inputs:
        if entry.name in known and known[entry.name] != entry.bytes:
            raise occupied_error(
                folder, f"shards of another {entry.name}: it had {entry.bytes} bytes, now {known[entry.name]}"
            )
    for old, new in zip(manifest.inputs, input_entries(preparation, _digests(preparation, stream)), strict=True):
        if old != new and (stream is not None or old.name in known):
            raise occupied_error(folder, f"shards of another {old.name}: its contents have changed")
    return ShardSet.open(folder)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of the settings that differ."""
    for name in {**new, **old}:
        before, value = old.get(name), new.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from _differences(before, value)
        elif before != value:
            yield name, before, value


def _digests(preparation: Preparation, stream: BinaryIO | None) -> list[tuple[Piece, str]]:
    if stream is not None:
        chunks = stdin_chunks(stream, STDIN_UNIT_BYTES)
        return [
            (Piece(STDIN, "", "", 0, len(chunk), None, len(chunk)), xxhash.xxh3_128_hexdigest(chunk))
            for chunk in chunks
        ]
    pieces = [piece for unit in preparation.units for piece in unit.pieces]
    with ThreadPoolExecutor(available_cores()) as pool:
        # A hub dataset is recognised by its revision; there is nothing to hash without reading it all again.
        return [(piece, found or "") for piece, found in zip(pieces, pool.map(piece_digest, pieces), strict=True)]
