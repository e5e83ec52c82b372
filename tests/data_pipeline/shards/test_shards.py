"""Shard folders: written, read back, and every kind of damage found."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.files import FileHasher
from data_pipeline.prepare.plan import Settings, plan_preparation
from data_pipeline.prepare.run import PrepareResult, prepare
from data_pipeline.shards.manifest import BLOCK_BYTES, read_manifest
from data_pipeline.shards.shardset import ShardSet, verify_shards
from data_pipeline.shards.summary import entropy, summarise
from data_pipeline.shards.writer import token_dtype
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "<mask>", "</s>", "été", "\n"]
TEXTS = [" ".join(WORDS[(i * k) % 9] for k in range(1 + (i * 37) % 50)) for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for name, part in (("a.jsonl", TEXTS[:90]), ("b.jsonl", TEXTS[90:])):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


@pytest.fixture(scope="module")
def made(inputs: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PrepareResult:
    folder = tmp_path_factory.mktemp("shards") / "train"
    return prepare(plan_preparation([inputs], tokenizer, Settings(shard_tokens=700)), folder)


@pytest.fixture
def shards(made: PrepareResult) -> ShardSet:
    return made.shards


@pytest.fixture
def copy(made: PrepareResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.shards.path, tmp_path / "copy"))


def stream_of(tokenizer: Tokenizer) -> np.ndarray:
    return np.concatenate([[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS])


def test_the_stream_is_the_documents_each_with_its_end(shards: ShardSet, tokenizer: Tokenizer) -> None:
    expected = stream_of(tokenizer)
    assert len(shards.manifest.shards) > 5
    assert shards.num_tokens == len(expected)
    assert shards.num_documents == len(TEXTS)
    np.testing.assert_array_equal(np.concatenate(list(shards.chunks(size=100))), expected)
    assert (expected == tokenizer.eos_id).sum() == len(TEXTS)  # a literal </s> in the text did not become one
    assert not (expected == tokenizer.mask_id).any()


def test_documents_come_back(shards: ShardSet, tokenizer: Tokenizer) -> None:
    documents = list(shards.documents())
    assert [tokenizer.decode(ids) for ids in documents] == TEXTS
    assert all(ids.dtype == np.int64 for ids in documents)
    assert [ids.tolist() for ids in shards.documents(limit=3)] == [ids.tolist() for ids in documents[:3]]
    assert list(shards.documents(limit=0)) == []


def test_any_rows_are_gathered_across_shards(shards: ShardSet, tokenizer: Tokenizer) -> None:
    stream = stream_of(tokenizer)
    for length in (1, 2, 64, 699, 1500, len(stream)):  # 1500 tokens span three shards
        starts = np.arange(0, len(stream) - length + 1, 1 if length < 100 else 13)
        rows = shards.read(starts, length)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(rows, stream[starts[:, None] + np.arange(length)])
    assert shards.read(np.array([], dtype=np.int64), 5).shape == (0, 5)


def test_rows_outside_the_stream_are_refused(shards: ShardSet) -> None:
    for start, length in ((-1, 4), (shards.num_tokens - 3, 4), (0, 0)):
        with pytest.raises(ValueError, match="must lie within the stream"):
            shards.read(np.array([0, start]), length)


def test_what_a_shard_set_says(shards: ShardSet, tokenizer: Tokenizer, inputs: Path) -> None:
    assert shards.tokenizer().hash == shards.tokenizer_hash == tokenizer.hash
    assert shards.vocab_size == tokenizer.vocab_size
    assert (shards.pad_id, shards.eos_id, shards.mask_id, shards.special_ids) == (1, 2, 4, (0, 1, 2, 3, 4))
    manifest = shards.manifest
    assert manifest.dtype == "uint16"
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert [(entry.name, entry.bytes) for entry in manifest.inputs] == [
        (name, (inputs / name).stat().st_size) for name in ("a.jsonl", "b.jsonl")
    ]
    assert shards.fingerprint == ShardSet.open(shards.path, expect_tokenizer=tokenizer.hash).fingerprint
    listed = {"manifest.json", *(entry.name for entry in manifest.files())}
    assert listed == {p.name for p in shards.path.iterdir()}  # nothing unlisted is left behind


def test_sources_are_kept_by_document(shards: ShardSet) -> None:
    import pyarrow as pa

    sources = []
    for shard in shards.manifest.shards:
        with pa.memory_map(str(shards.path / shard.index.name)) as f:
            sources += pa.ipc.open_file(f).read_all().column("source").to_pylist()
    assert sources == ["a.jsonl"] * 90 + ["b.jsonl"] * 110


def test_another_tokenizer_is_refused(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="made with another tokenizer"):
        ShardSet.open(shards.path, expect_tokenizer="0" * 64)


def test_large_vocabularies_take_four_bytes(tokenizer: Tokenizer) -> None:
    assert [token_dtype(n) for n in (300, 65_536, 65_537, 200_000)] == ["uint16", "uint16", "uint32", "uint32"]


def test_uint32_shards_are_read_alike(
    inputs: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: ShardSet
) -> None:
    for module in ("worker", "run", "complete"):
        monkeypatch.setattr(f"data_pipeline.prepare.{module}.token_dtype", lambda vocab_size: "uint32")
    wide = prepare(plan_preparation([inputs], tokenizer, Settings(shard_tokens=900)), tmp_path / "wide").shards
    assert wide.manifest.dtype == "uint32"
    starts = np.arange(0, shards.num_tokens - 50, 17)
    np.testing.assert_array_equal(wide.read(starts, 50), shards.read(starts, 50))


def test_summary(shards: ShardSet, tokenizer: Tokenizer) -> None:
    counts = np.bincount(stream_of(tokenizer))
    p = counts[counts > 0] / counts.sum()
    summary = summarise(shards)
    assert summary.unigram_entropy == pytest.approx(-sum(x * np.log(x) for x in p), rel=1e-12)
    assert summary.bytes_per_token == pytest.approx(sum(len(t.encode()) for t in TEXTS) / counts.sum())
    assert (summary.tokens, summary.documents) == (counts.sum(), len(TEXTS))
    assert entropy(np.array([5, 5, 0])) == pytest.approx(np.log(2))


def test_a_whole_folder_verifies(made: PrepareResult) -> None:
    seen: list[str] = []
    assert verify_shards(made.shards.path, lambda entry: seen.append(entry.name)) == []
    assert seen == [entry.name for entry in made.shards.manifest.files()]


def test_verify_finds_a_flipped_bit_in_any_file(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        original = path.read_bytes()
        for place in {0, len(original) // 3, len(original) - 1}:
            damaged = bytearray(original)
            damaged[place] ^= 0x10
            path.write_bytes(damaged)
            if path.name == "manifest.json":
                with pytest.raises(UserError, match=r"manifest\.json"):
                    verify_shards(copy)
            else:
                faults = verify_shards(copy)
                assert len(faults) == 1
                assert faults[0].startswith(f"{path}, block 0 ")
        path.write_bytes(original)
    assert verify_shards(copy) == []


def test_verify_names_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [[7] * 5_000_000 for _ in texts])
    (tmp_path / "a.txt").write_text("long")
    folder = tmp_path / "long"
    prepare(plan_preparation([tmp_path / "a.txt"], tokenizer), folder)
    path = folder / "tokens-00000-00000.bin"  # 10,000,002 bytes: three blocks of 4 MiB
    data = bytearray(path.read_bytes())
    data[4_194_304] ^= 1
    data[-1] ^= 1
    path.write_bytes(data)
    assert [fault.split(":")[0] for fault in verify_shards(folder)] == [
        f"{path}, block 1 (bytes 4194304 to 8388607)",
        f"{path}, block 2 (bytes 8388608 to 10000001)",
    ]


def test_a_manifest_cannot_be_edited(copy: Path) -> None:
    path = copy / "manifest.json"
    text = path.read_text()
    edits = (
        text.replace('"num_documents": 200', '"num_documents": 201'),
        text.replace("\n ", "\n  ", 1),
        text.replace('"settings"', '"settinks"'),
        text[: len(text) // 2],
        "",
        "[]",
        '{"format": "nystrom-shards", "format_version": 2}',
    )
    for edited in edits:
        assert edited != text
        path.write_text(edited)
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            ShardSet.open(copy)
    path.write_text(text.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(UserError, match="format version 3, this program reads version 2"):
        ShardSet.open(copy)
    path.write_text('{"format": "other"}')
    with pytest.raises(UserError, match="is not a manifest of shards"):
        ShardSet.open(copy)


def test_missing_and_cut_files_are_named_at_opening(copy: Path) -> None:
    manifest = read_manifest(copy)
    for entry in manifest.files():
        path = copy / entry.name
        original = path.read_bytes()
        path.write_bytes(original[:-1])
        with pytest.raises(
            UserError, match=f"{entry.name} has {entry.bytes - 1} bytes, the manifest says {entry.bytes}"
        ):
            ShardSet.open(copy)
        assert len(verify_shards(copy)) == 1
        path.unlink()
        with pytest.raises(UserError, match=f"{entry.name} is missing"):
            ShardSet.open(copy)
        assert len(verify_shards(copy)) == 1
        path.write_bytes(original)


def test_a_token_outside_the_vocabulary_is_an_error_that_names_the_shard(copy: Path) -> None:
    entry = read_manifest(copy).shards[2]
    tokens = np.fromfile(copy / entry.tokens.name, dtype="<u2")
    tokens[10] = 60_000
    tokens.tofile(copy / entry.tokens.name)
    shards = ShardSet.open(copy)
    with pytest.raises(
        UserError, match=f"{entry.tokens.name} is damaged: token 60000 is outside the vocabulary of {shards.vocab_size}"
    ):
        shards.read(np.array([0]), shards.num_tokens)


def test_a_damaged_index_is_named(copy: Path) -> None:
    entry = read_manifest(copy).shards[0]
    (copy / entry.index.name).write_bytes(bytes(entry.index.bytes))
    with pytest.raises(UserError, match=f"{entry.index.name} is damaged"):
        list(ShardSet.open(copy).documents())


def everything(folder: Path) -> list[object]:
    """All that readers see of a shard folder besides the tokens' own file."""
    shards = ShardSet.open(folder)
    entries = [shard.index for shard in shards.manifest.shards]
    return [
        shards.manifest,
        shards.tokenizer().hash,
        [ids.tolist() for ids in shards.documents()],
        [shards.document_ends(entry).tolist() for entry in entries],
        [(names, places.tolist()) for names, places in map(shards.document_sources, entries)],
    ]


@pytest.mark.parametrize("pattern", ["index-*", "manifest.json", "tokenizer*.json"])
def test_a_flipped_bit_is_an_error_or_changes_nothing(copy: Path, pattern: str) -> None:
    """Without `verify`. Of 500 flips in indexes 107 gave other exceptions, 48 other documents and 3 a SIGBUS."""
    rng = random.Random(7)
    files = sorted(copy.glob(pattern))
    expected, errors = everything(copy), list[str]()
    for _ in range(60 if pattern == "index-*" else 20):
        file = rng.choice(files)
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            assert everything(copy) == expected
        except UserError as error:
            errors.append(str(error))
        file.write_bytes(original)
    assert len(errors) == 60 if pattern == "index-*" else len(errors) > 10
    assert all(str(copy) in error for error in errors)
    assert everything(copy) == expected


def test_a_token_file_that_is_cut_short_while_it_is_read_ends_in_an_error(copy: Path) -> None:
    """Reading behind the end of a mapped file is SIGBUS, which ends the process without a word."""
    shards = ShardSet.open(copy)
    first = shards.manifest.shards[0]
    os.truncate(copy / first.tokens.name, 4)
    match = f"{first.tokens.name} was cut short while it was read: it has 4 bytes, the manifest says"
    for read in (
        lambda: shards.read(np.array([0]), 8),
        lambda: shards.read(np.array([first.num_tokens - 4]), 8),  # on into the next shard
        lambda: shards.gather(np.array([20]), np.array([8])),
        lambda: list(shards.documents()),
        lambda: list(shards.chunks()),
    ):
        with pytest.raises(UserError, match=match):
            read()
    assert shards.read(np.array([shards.num_tokens - 8]), 8).shape == (1, 8)
    with pytest.raises(UserError, match="it was cut short or changed"):
        ShardSet.open(copy)


def test_another_process_opens_the_folder_itself(copy: Path) -> None:
    shards = ShardSet.open(copy)
    again = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(again.read(np.array([3]), 20), shards.read(np.array([3]), 20))


def test_what_is_no_shard_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        ShardSet.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        ShardSet.open(tmp_path)


def test_block_hashes_do_not_depend_on_how_the_bytes_came() -> None:
    data = np.random.default_rng(0).bytes(2 * BLOCK_BYTES + 12_345)
    whole, parts = FileHasher(BLOCK_BYTES), FileHasher(BLOCK_BYTES)
    whole.update(data)
    for start in range(0, len(data), 777_777):
        parts.update(data[start : start + 777_777])
    assert whole.entry("x") == parts.entry("x")
    assert len(whole.entry("x").blocks) == 3
    exact = FileHasher(BLOCK_BYTES)
    exact.update(data[: 2 * BLOCK_BYTES])
    assert exact.entry("x").blocks == whole.entry("x").blocks[:2]
