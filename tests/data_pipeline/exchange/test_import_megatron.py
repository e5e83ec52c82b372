"""Megatron-LM's indexed datasets become shards: the same ids, and whatever does not fit is refused with its place."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from exchange_case import write_megatron
from prepare_case import TEXTS, contents

from data_pipeline.errors import UserError
from data_pipeline.exchange.imports import ImportResult, import_tokens
from data_pipeline.exchange.plan import plan_import
from data_pipeline.shards.shardset import ShardSet, verify_shards
from data_pipeline.tokenization.tokenizer import Tokenizer

DOCUMENTS = [[[10, 11, 12]], [[20], [21, 22]], [[30, 31]]]


def run(source: Path, tokenizer: Tokenizer, out: Path, **options: object) -> ImportResult:
    """Import one source; ``workers`` and ``overwrite`` are those of the import, all else of the plan."""
    how = {name: options.pop(name) for name in ("workers", "overwrite", "on_bytes") if name in options}
    return import_tokens(plan_import([source], tokenizer, **options), out, **how)  # type: ignore[arg-type]


def ids_of(shards: ShardSet) -> list[list[int]]:
    return [document.tolist() for document in shards.documents()]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint16"])
def test_sequences_of_a_document_are_joined(dtype: str, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    result = run(write_megatron(tmp_path / "a", DOCUMENTS, dtype), small_tokenizer, tmp_path / "out")
    assert ids_of(result.shards) == [[10, 11, 12], [20, 21, 22], [30, 31]]
    assert result.shards.read(np.array([0]), 4).tolist() == [[10, 11, 12, small_tokenizer.eos_id]]
    assert (result.source_documents, result.source_tokens, result.with_end, result.without_end) == (3, 8, 0, 3)
    assert [entry.name for entry in result.shards.manifest.inputs] == ["a.idx", "a.bin"]
    assert verify_shards(tmp_path / "out") == []
    assert result.shards.document_sources(result.shards.manifest.shards[0].index)[0] == ["a.bin"]


def test_the_ids_are_those_of_the_text_prepared_here(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    ids = [small_tokenizer.encode(text) for text in TEXTS]
    write_megatron(tmp_path / "a", [[[*document, small_tokenizer.eos_id]] for document in ids])
    result = run(tmp_path / "a", small_tokenizer, tmp_path / "out", shard_tokens=500)
    assert ids_of(result.shards) == ids
    assert len(result.shards.manifest.shards) > 2
    assert (result.with_end, result.without_end) == (len(TEXTS), 0)
    assert result.shards.num_tokens == sum(map(len, ids)) + len(ids)


def test_a_source_may_end_its_documents_with_another_token(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    source = write_megatron(tmp_path / "a", [[[10, 11, 300]], [[300, 12, 300]]])
    result = run(source, small_tokenizer, tmp_path / "out", end_token="300")
    assert ids_of(result.shards) == [[10, 11], [300, 12]]
    assert result.inner_ends == 1
    kept = run(source, small_tokenizer, tmp_path / "kept", end_token="none")
    assert ids_of(kept.shards) == [[10, 11, 300], [300, 12, 300]]
    with pytest.raises(
        UserError, match=r"'nowhere' is neither a token nor an id of the tokenizer, which has 320 tokens"
    ):
        plan_import([source], small_tokenizer, end_token="nowhere")


def test_documents_without_a_token_are_left_out_and_counted(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    eos = small_tokenizer.eos_id
    source = write_megatron(tmp_path / "a", [[], [[10, eos]], [], [[eos]], [[11, eos]], []])
    result = run(source, small_tokenizer, tmp_path / "out")
    assert ids_of(result.shards) == [[10], [11]]
    assert (result.source_documents, result.shards.manifest.empty_documents) == (6, 4)


def test_ends_that_differ_are_refused_with_both_places(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = small_tokenizer.eos_id
    source = write_megatron(tmp_path / "a", [[[10, eos]], [[20, 21]], [[30, eos]]])
    mixed = rf"document 0 at byte 0\), some do not \({source}, document 1 at byte 4\).*add --overwrite"
    with pytest.raises(UserError, match=mixed):
        run(source, small_tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="document 1 at byte 4: the document does not end with the end token 10: was"):
        run(write_megatron(tmp_path / "b", [[[9, 10]], [[20]]]), small_tokenizer, tmp_path / "b", end_token="10")
    taken = run(source, small_tokenizer, tmp_path / "out", mixed_ends=True, overwrite=True)
    assert ids_of(taken.shards) == [[10], [20, 21], [30]]
    assert (taken.with_end, taken.without_end) == (2, 1)
    # Also where each unit of work has one kind only.
    monkeypatch.setattr("data_pipeline.exchange.plan.unit_bytes", lambda size: 1)
    with pytest.raises(UserError, match=mixed):
        run(source, small_tokenizer, tmp_path / "units")


@pytest.mark.parametrize("wrong", [320, -1, 40000])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(
    wrong: int, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    source = write_megatron(tmp_path / "a", [[[10, 11]], [[12], [13, wrong]]], "int32")
    with pytest.raises(UserError, match=rf"a.bin, document 1 at byte 8: token 2 \(byte 16\) is id {wrong}, which the"):
        run(source, small_tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def spoil(path: Path, at: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"XXIDIDX", r"is not an index of Megatron-LM: it begins with b'XXIDIDX"),
        (0, b"TNTIDX\x00\x00", "of Megatron's older format"),
        (9, struct.pack("<Q", 2), "has version 2 of Megatron-LM's format"),
        (17, b"\x07", r"holds float32 or float64 values, not token ids \(dtype code 7\)"),
        (17, b"\x63", r"values of an unknown type \(dtype code 99\)"),
        (17, b"\x04", "sequence 1 begins at byte 6, those before it end at 12"),  # int32 for uint16
        (18, struct.pack("<Q", 5), "has 114 bytes, and 5 sequences in 3 documents take 126"),
        (18, struct.pack("<Q", 1 << 60), "it was cut short or changed"),
        (18, struct.pack("<Q", 0), "lists no documents: move the pair away"),
        (34, struct.pack("<i", -1), "sequence 0 has a length of -1 tokens"),
        (34 + 16 + 8, struct.pack("<q", 7), "sequence 1 begins at byte 7, those before it end at 6"),
        (34 + 48, struct.pack("<q", 1), "its documents do not follow each other"),
        (34 + 48 + 8, struct.pack("<q", 9), "its documents do not follow each other"),
        (34 + 48 + 24, struct.pack("<q", 3), "its documents end at sequence 3 of 4"),
    ],
)
def test_a_damaged_index_is_refused(
    at: int, data: bytes, message: str, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS)
    spoil(tmp_path / "a.idx", at, data)
    with pytest.raises(UserError, match=message):
        plan_import([tmp_path / "a"], small_tokenizer)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    tokens = write_megatron(tmp_path / "a", DOCUMENTS)
    whole, index = tokens.read_bytes(), (tmp_path / "a.idx").read_bytes()
    for data in (whole[:-2], whole + b"\0\0"):
        tokens.write_bytes(data)
        with pytest.raises(UserError, match=rf"a.bin has {len(data)} bytes, its index a.idx says 16: it was cut short"):
            plan_import([tokens], small_tokenizer)
    tokens.write_bytes(b"")
    with pytest.raises(UserError, match=r"a.bin is empty"):
        plan_import([tokens], small_tokenizer)
    tokens.write_bytes(whole)
    for data, message in ((index[:-8], "cut short"), (index[:20], "ends in its header"), (b"", "is empty")):
        (tmp_path / "a.idx").write_bytes(data)
        with pytest.raises(UserError, match=message):
            plan_import([tokens], small_tokenizer)
    (tmp_path / "a.idx").write_bytes(index + bytes(4))
    with pytest.raises(UserError, match="is of a multimodal dataset"):
        plan_import([tokens], small_tokenizer)
    (tmp_path / "a.idx").unlink()
    with pytest.raises(UserError, match=r"a.idx is missing: it holds the index"):
        plan_import([tokens], small_tokenizer)
    tokens.unlink()
    with pytest.raises(UserError, match="a does not exist, nor do"):
        plan_import([tmp_path / "a"], small_tokenizer)


def test_sources_are_prefixes_files_folders_and_patterns(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    for name in ("b", "a", "deep/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_megatron(tmp_path / name, DOCUMENTS)
    given = [[tmp_path], [f"{tmp_path}/**/*.idx"], [tmp_path / "a.idx", tmp_path / "b", tmp_path / "deep", tmp_path]]
    for inputs in given:
        plan = plan_import(inputs, small_tokenizer)  # type: ignore[arg-type]
        assert [source.path.name for source in plan.sources] == ["a.bin", "b.bin", "c.bin"]
    run(tmp_path / "a", small_tokenizer, tmp_path / "deep" / "out")
    assert [s.path.name for s in plan_import([tmp_path / "deep"], small_tokenizer).sources] == ["c.bin"]
    for wrong in (tmp_path / "deep" / "out", tmp_path / "out.txt", tmp_path / "*.txt"):
        (tmp_path / "out.txt").touch()
        with pytest.raises(UserError, match=r"token file.*these are read: Megatron-LM's"):
            plan_import([wrong if wrong.name != "*.txt" else tmp_path / "n*.txt"], small_tokenizer)


def test_an_interrupted_import_resumes_to_the_same_bytes(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [small_tokenizer.encode(text) for text in TEXTS]
    source = write_megatron(tmp_path / "a", [[document] for document in ids])
    monkeypatch.setattr("data_pipeline.exchange.plan.unit_bytes", lambda size: 2500)
    assert len(plan_import([source], small_tokenizer).units) == 4
    run(source, small_tokenizer, tmp_path / "whole", shard_tokens=1000)
    left = 2

    def stop(size: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, small_tokenizer, tmp_path / "out", shard_tokens=1000, on_bytes=stop)
    result = run(source, small_tokenizer, tmp_path / "out", shard_tokens=1000)
    assert result.units_reused == 2
    assert (result.source_documents, result.source_tokens) == (len(ids), sum(map(len, ids)))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert run(source, small_tokenizer, tmp_path / "out", shard_tokens=1000).already_complete
    with pytest.raises(UserError, match="shards made with another end_id"):
        run(source, small_tokenizer, tmp_path / "out", shard_tokens=1000, end_token="none")
    spoil(source, 0, b"\x21\x00")
    with pytest.raises(UserError, match=r"shards of another a.bin: its contents have changed"):
        run(source, small_tokenizer, tmp_path / "out", shard_tokens=1000)


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_megatron(tmp_path / "a", [[small_tokenizer.encode(text)] for text in TEXTS])
    monkeypatch.setattr("data_pipeline.exchange.plan.unit_bytes", lambda size: 1000)
    run(source, small_tokenizer, tmp_path / "one")
    run(source, small_tokenizer, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
