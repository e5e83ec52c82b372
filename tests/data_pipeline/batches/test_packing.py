"""Packed blocks: nothing lost, documents whole and apart, little padding, and places that follow from the number."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batches import packing
from data_pipeline.batches.bestfit import best_fit, pack
from data_pipeline.batches.blocks import Rows
from data_pipeline.batches.lru_cache import LRUCache
from data_pipeline.batches.packing import POOL_WINDOWS, PackedBlocks, PoolOrder
from data_pipeline.errors import UserError
from data_pipeline.files import hash_file
from data_pipeline.shards.manifest import BLOCK_BYTES, Manifest
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.shards.writer import UnitWriter

FIRST = 8  # the token at position 0 of the stream: each token says where it stands


def write(folder: Path, lengths: Sequence[int], shard_tokens: int = 700) -> ShardSet:
    """Shards of documents with these lengths (the closing token included) whose tokens count up along the stream."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    tokenizer = hash_file(folder, "tokenizer.json", BLOCK_BYTES)
    writer = UnitWriter(folder, 0, dtype="uint32", shard_tokens=shard_tokens, eos_id=2)
    for length in lengths:
        writer.add(np.zeros(length - 1, dtype=np.int64), "a")
    shards = writer.finish()
    position = FIRST
    for shard in shards:
        np.arange(position, position + shard.num_tokens, dtype="<u4").tofile(folder / shard.tokens.name)
        position += shard.num_tokens
    Manifest(
        settings={},
        num_tokens=int(sum(lengths)),
        num_documents=len(lengths),
        text_bytes=0,
        empty_documents=0,
        bad_records={},
        dropped_documents={},
        dtype="uint32",
        vocab_size=position,
        tokenizer_hash="",
        special_ids={"pad": 1, "eos": 2, "mask": 4},
        other_special_ids=(),
        tokenizer=(tokenizer,),
        reports=(),
        shards=shards,
        inputs=(),
    ).write(folder)
    return ShardSet.open(folder)


def random_lengths(rng: np.random.Generator) -> list[int]:
    """A corpus of one of several temperaments, some with documents of many blocks."""
    count = int(rng.integers(1, 120))
    kind = rng.integers(0, 4)
    if kind == 0:
        return rng.integers(1, 12, count).tolist()  # type: ignore[no-any-return]
    if kind == 1:
        return (1 + np.exp(rng.normal(2.5, 1.2, count)).astype(int)).tolist()  # type: ignore[no-any-return]
    if kind == 2:
        return np.where(rng.random(count) < 0.05, rng.integers(500, 3000, count), rng.integers(1, 60, count)).tolist()  # type: ignore[no-any-return]
    return [int(rng.integers(20, 40))] * count  # alike: the hardest to pack


def segments(rows: Rows) -> list[tuple[int, int, int, int]]:
    """(row, column, first position in the stream, length) of each run of one number."""
    assert rows.documents is not None
    out = []
    for row, (ids, tokens) in enumerate(zip(rows.documents, rows.tokens, strict=True)):
        edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        for a, b in itertools.pairwise(edges):
            if ids[a] >= 0:
                np.testing.assert_array_equal(np.diff(tokens[a:b]), 1)  # a stretch of the stream
                out.append((row, a, int(tokens[a]) - FIRST, b - a))
    return out


CASES = [
    # block_length, slice_length, max_padding, window_tokens
    (32, 32, 0.02, None),
    (32, 8, 0.1, 400),
    (64, 16, 0.05, 1000),
    (16, 4, 0.0, 100),  # no room to spare, windows shorter than documents
    (60, 20, 0.3, 500),
    (8, 1, 0.02, 64),
]


@pytest.mark.parametrize("seed", range(10))
def test_an_epoch_holds_every_token_once_and_every_rule_is_kept(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = random_lengths(rng)
    shards = write(tmp_path / "s", lengths, shard_tokens=int(rng.choice([50, 700, 10**6])))
    bounds = np.cumsum([0, *lengths])
    ends = set(bounds[1:].tolist())
    for block_length, slice_length, max_padding, window_tokens in CASES:
        blocks = PackedBlocks(
            shards, block_length, slice_length=slice_length, max_padding=max_padding, window_tokens=window_tokens
        )
        rows = blocks.read(np.arange(blocks.num_blocks), 0, block_length, causal=True)
        assert rows.documents is not None
        assert rows.next_tokens is not None
        assert rows.tokens.shape == rows.next_tokens.shape == rows.documents.shape == (blocks.num_blocks, block_length)
        assert (rows.tokens.dtype, rows.next_tokens.dtype, rows.documents.dtype) == (np.int64, np.int64, np.int32)
        real = rows.documents >= 0
        np.testing.assert_array_equal(np.sort(rows.tokens[real]), FIRST + np.arange(bounds[-1]))
        assert (rows.tokens[~real] == shards.pad_id).all()

        windows = -(-int(bounds[-1]) // (window_tokens or 1 << 19))
        assert blocks.padding == pytest.approx(1 - bounds[-1] / rows.tokens.size)
        assert rows.tokens.size - bounds[-1] <= max_padding * rows.tokens.size + windows * block_length

        position = rows.tokens - FIRST
        closing = np.isin(position + 1, bounds[1:])
        expected = np.where(real & ~closing, rows.tokens + 1, -100)
        np.testing.assert_array_equal(rows.next_tokens, expected)

        places: dict[int, list[tuple[int, int, int, int]]] = {}
        for segment in segments(rows):
            document = int(np.searchsorted(bounds, segment[2], side="right")) - 1
            assert segment[2] + segment[3] <= bounds[document + 1]  # one document, never a part of the next
            places.setdefault(document, []).append(segment)
        cut, cut_in_slice = 0, 0
        for document, parts in places.items():
            in_order = [start for _, _, start, _ in parts]
            for row in {part[0] for part in parts}:  # in order along a row
                starts = [start for r, _, start, _ in parts if r == row]
                assert starts == sorted(starts)
            if lengths[document] > block_length:  # as many whole blocks as it has
                assert sum(part[3] == block_length for part in parts) >= lengths[document] // block_length
            else:
                cut += len(parts) > 1
            if lengths[document] <= slice_length:
                cut_in_slice += len(in_order) > 1 or (
                    parts[0][1] // slice_length != (parts[0][1] + parts[0][3] - 1) // slice_length
                )
        summary = blocks.summary(max_windows=10**9)
        assert (summary.tokens, summary.slots, summary.documents) == (bounds[-1], rows.tokens.size, len(lengths))
        assert (summary.cut_in_block, summary.cut_in_slice) == (cut, cut_in_slice)
        assert summary.fit_block == sum(length <= block_length for length in lengths)
        assert summary.fit_slice == sum(length <= slice_length for length in lengths)
        assert len(ends) == summary.documents


def test_rows_of_every_length_are_slices_of_the_block(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", random_lengths(np.random.default_rng(11)) * 3)
    blocks = PackedBlocks(shards, 64, slice_length=8, window_tokens=500)
    chosen = np.array([3, 0, blocks.num_blocks - 1, 3, 1])
    whole = blocks.read(chosen, 0, 64, causal=True)
    assert whole.documents is not None
    assert whole.next_tokens is not None
    for length in (8, 16, 32, 64, 5):
        for offset in range(0, 65 - length, length):
            part = slice(offset, offset + length)
            rows = blocks.read(chosen, offset, length, causal=True)
            assert rows.documents is not None
            np.testing.assert_array_equal(rows.tokens, whole.tokens[:, part])
            np.testing.assert_array_equal(rows.next_tokens, whole.next_tokens[:, part])
            np.testing.assert_array_equal(rows.documents < 0, whole.documents[:, part] < 0)
            np.testing.assert_array_equal(np.diff(rows.documents) != 0, np.diff(whole.documents[:, part]) != 0)
            bidirectional = blocks.read(chosen, offset, length, causal=False)
            assert bidirectional.next_tokens is None
            np.testing.assert_array_equal(bidirectional.tokens, rows.tokens)
            np.testing.assert_array_equal(bidirectional.documents, rows.documents)


def naive_best_fit(lengths: Sequence[int], room: Sequence[int]) -> list[int]:
    """Room left in the bin that each item goes to, one item at a time; which of equal bins it is does not matter."""
    left, out = list(room), []
    for length in lengths:
        fits = [i for i, free in enumerate(left) if free >= length]
        if not fits:
            out.append(-1)
            continue
        best = min(fits, key=lambda i: left[i])
        left[best] -= length
        out.append(left[best])
    return out


def test_equal_items_dealt_at_once_end_as_if_dealt_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = np.sort(rng.integers(1, rng.integers(2, 30), rng.integers(1, 60)))[::-1]
        room = rng.integers(0, 40, rng.integers(1, 20))
        bins = best_fit(lengths, room)
        left, rooms = room.copy(), []
        for length, number in zip(lengths.tolist(), bins.tolist(), strict=True):
            if number >= 0:
                left[number] -= length
            rooms.append(int(left[number]) if number >= 0 else -1)
        assert left.min() >= 0
        assert rooms == naive_best_fit(lengths.tolist(), room.tolist())


def test_documents_that_fit_are_whole() -> None:
    # Two slices of 8: 5 + 3 and 6 + 2 fill them, and 11 + 5 a block of 16, whatever the order in the stream.
    packed = pack(np.cumsum([0, 2, 5, 11, 3, 5, 6]), 2, 16, 8)
    assert sorted(packed.lengths.tolist()) == [2, 3, 5, 5, 6, 11]
    assert packed.closes.all()
    short = packed.lengths <= 8
    crossing = packed.at // 8 != (packed.at + packed.lengths - 1) // 8
    assert not (crossing & short)[packed.lengths != 5].any()
    with pytest.raises(ValueError, match="33 tokens do not fit into 2 blocks of 16"):
        pack(np.array([0, 33]), 2, 16, 8)


def test_what_fits_no_slice_is_whole_in_the_long_row_if_it_can_be() -> None:
    # Six documents of 5 in four slices of 8 (two blocks): four have a slice of their own, and no 5 are left in one.
    packed = pack(np.arange(0, 31, 5), 2, 16, 8)
    assert packed.lengths.sum() == 30
    assert (packed.lengths == 5).sum() == 4
    assert packed.closes.sum() == 6
    # Three of 6 in one block of 24 with slices of 8, and one of 5: no slice has 5 left, nor has any stretch.
    packed = pack(np.array([0, 6, 12, 18, 23]), 1, 24, 8)
    assert packed.lengths.tolist().count(6) == 3
    assert len(packed.lengths) == 6


def test_rows_of_padding_alone_are_avoided() -> None:
    packed = pack(np.arange(0, 41), 4, 16, 4)  # forty documents of one token fill 10 of the 16 slices
    np.testing.assert_array_equal(np.sort(packed.starts), np.arange(40))
    assert len(np.unique(packed.at)) == 40
    assert set((packed.at // 4).tolist()) == set(range(16))
    packed = pack(np.arange(0, 31, 5), 4, 16, 4)  # six documents longer than a slice fill 2 of the 4 blocks
    np.testing.assert_array_equal(packed.lengths, 5)
    assert set((packed.at // 16).tolist()) == set(range(4))
    assert (np.diff(packed.at) >= 5).all()
    packed = pack(np.array([0, 4, 5, 6, 7]), 3, 4, 4)  # the longest fills its block and stays: one of the others moves
    assert set((packed.at // 4).tolist()) == {0, 1, 2}


def test_a_window_is_packed_once_an_epoch_and_few_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(packing, "_KEPT_SEGMENTS", 0)  # no more than two pools are kept
    monkeypatch.setattr(packing, "pack", lambda *args: calls.append(int(args[0][0])) or pack(*args))
    shards = write(tmp_path / "s", [7] * 6000, shard_tokens=9000)
    blocks = PackedBlocks(shards, 16, slice_length=8, window_tokens=100)
    order = blocks.order(3, 0)
    windows = int((np.diff(blocks._firsts) > 0).sum())
    assert windows > 6 * POOL_WINDOWS
    for first in range(0, blocks.num_blocks, 64):
        draws = np.arange(first, min(first + 64, blocks.num_blocks))
        for offset in (0, 8):
            blocks.read(order.blocks(draws), offset, 8, causal=False)
    assert len(calls) == windows
    calls.clear()
    fresh = PackedBlocks(shards, 16, slice_length=8, window_tokens=100)
    draws = 12_345 * blocks.num_blocks + 777 + np.arange(32)
    resumed = fresh.read(fresh.order(3, 0).blocks(draws), 0, 16, causal=True)
    assert len(calls) <= 32
    for a, b in zip(resumed, blocks.read(order.blocks(draws), 0, 16, causal=True), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("windows", [1, 2, 63, 65, 200])
def test_each_epoch_is_another_order_of_all_blocks(windows: int) -> None:
    counts = np.random.default_rng(windows).integers(0, 30, windows)
    counts[0] = 17
    total = int(counts.sum())
    order = PoolOrder(counts, 5, 0)
    epochs = order.blocks(np.arange(4 * total).reshape(4, total))
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(total))
    others = [PoolOrder(counts, 6, 0), PoolOrder(counts, 5, 1)]
    rows = [tuple(epoch) for epoch in epochs] + [tuple(other.blocks(np.arange(total))) for other in others]
    assert len(set(rows)) == len(rows)
    # Any draws in any order, by an object that has seen nothing.
    some = np.random.default_rng(0).integers(0, 4 * total, (3, 5))
    np.testing.assert_array_equal(PoolOrder(counts, 5, 0).blocks(some), epochs.reshape(-1)[some])


def test_neighbouring_draws_come_from_a_pool_of_distant_windows() -> None:
    counts = np.full(1000, 100)
    order = PoolOrder(counts, 1, 0)
    blocks = order.blocks(np.arange(counts.sum()))
    assert len(np.intersect1d(blocks[:6000] // 100, order.blocks(counts.sum() + np.arange(6000)) // 100)) < 30
    pools = -(-1000 // POOL_WINDOWS)
    in_pools = [np.unique(part // 100) for part in np.split(blocks, np.arange(1, pools) * 1000 // pools * 100)]
    assert all(len(windows) <= POOL_WINDOWS for windows in in_pools)
    assert sum(len(windows) for windows in in_pools) == 1000  # no window is in two pools
    assert all(np.ptp(windows) > 700 for windows in in_pools)
    assert len(np.unique(blocks[:256] // 100)) > 55  # a batch holds text of nearly all windows of its pool


def test_equal_bytes_in_another_process(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", random_lengths(np.random.default_rng(2)) * 5)
    program = """
import sys, xxhash, numpy as np
from data_pipeline.batches.packing import PackedBlocks
from data_pipeline.shards.shardset import ShardSet
blocks = PackedBlocks(ShardSet.open(sys.argv[1]), 32, slice_length=8, window_tokens=300)
rows = blocks.read(blocks.order(9, 1).blocks(np.arange(100)), 0, 32, causal=True)
print(xxhash.xxh3_128_hexdigest(b"".join(part.tobytes() for part in rows)))
"""
    digests = set()
    for number in "12":
        copy = shutil.copytree(shards.path, tmp_path / number)
        done = subprocess.run(
            [sys.executable, "-c", program, str(copy)],
            env={**os.environ, "PYTHONHASHSEED": number},
            cwd=Path(packing.__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_runs_are_gathered_from_many_shards(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", [10, 1, 30, 5, 4, 7, 50, 2], shard_tokens=20)
    edges = np.cumsum([0, *(shard.num_tokens for shard in shards.manifest.shards)])
    assert edges.tolist() == [0, 41, 107, 109]
    starts, lengths = np.array([0, 3, 3, 41, 60, 107, 109]), np.array([2, 38, 1, 66, 0, 2, 0])
    expected = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]) + FIRST
    np.testing.assert_array_equal(shards.gather(starts, lengths), expected)
    assert shards.gather(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).shape == (0,)
    for bad in (([5, 3], [1, 1]), ([-1], [1]), ([40], [2]), ([108], [2]), ([109], [1]), ([200], [1])):
        with pytest.raises(ValueError, match="ascending order, and each within one shard"):
            shards.gather(np.array(bad[0]), np.array(bad[1]))


def test_damage_is_named(tmp_path: Path) -> None:
    lengths = [10] * 30
    shards = write(tmp_path / "tokens", lengths, shard_tokens=100)
    second = shards.manifest.shards[1]
    np.full(100, 10**6, dtype="<u4").tofile(shards.path / second.tokens.name)
    blocks = PackedBlocks(shards, 16)
    with pytest.raises(UserError, match=f"{second.tokens.name} is damaged: token 1000000 is outside the vocabulary"):
        blocks.read(np.arange(blocks.num_blocks), 0, 16, causal=False)
    shards = write(tmp_path / "ends", lengths, shard_tokens=100)
    first, other = shards.manifest.shards[0], write(tmp_path / "other", [9, 11, 50], 100).manifest.shards[0]
    shutil.copy(tmp_path / "other" / other.index.name, shards.path / first.index.name)
    with pytest.raises(UserError, match=rf"{first.index.name} is damaged: its contents do not match the manifest"):
        PackedBlocks(shards, 16)
    manifest = replace(shards.manifest, shards=(replace(first, index=other.index), *shards.manifest.shards[1:]))
    manifest.write(shards.path)  # each file as the manifest says, and together wrong
    with pytest.raises(UserError, match=rf"{first.index.name} is damaged: its document ends do not divide the 100"):
        PackedBlocks(ShardSet.open(shards.path), 16)


def test_mistakes_are_refused(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", [10] * 30)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="max_padding must be at least 0 and below 1"):
            PackedBlocks(shards, 16, max_padding=share)
    with pytest.raises(ValueError, match="slice_length 5 does not divide block_length 16"):
        PackedBlocks(shards, 16, slice_length=5)
    blocks = PackedBlocks(shards, 16)
    for number in (-1, blocks.num_blocks):
        with pytest.raises(ValueError, match="blocks must lie in"):
            blocks.read(np.array([0, number]), 0, 16, causal=False)
    for offset, length in ((-1, 4), (0, 17), (8, 9), (3, 0)):
        with pytest.raises(ValueError, match="is not a part of a block"):
            blocks.read(np.array([0]), offset, length, causal=False)
    assert blocks.read(np.zeros(0, dtype=np.int64), 0, 8, causal=True).tokens.shape == (0, 8)


def test_values_used_last_are_kept_within_their_budget() -> None:
    made: list[int] = []
    cache = LRUCache(lambda key: made.append(key) or "x" * key, keep=2, budget=10, size=len)
    for key in (1, 2, 3, 1):  # 6 in all
        assert cache(key) == "x" * key
    assert made == [1, 2, 3]
    cache(9)  # 15: the two used longest ago go, two are always kept
    cache(1)
    assert made == [1, 2, 3, 9]
    cache(3)
    assert made == [1, 2, 3, 9, 3]
