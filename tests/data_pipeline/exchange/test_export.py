"""Shards as Parquet and as Megatron-LM's pairs: what others read there is what the shards hold."""

from __future__ import annotations

import itertools
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exchange_case import write_megatron
from prepare_case import TEXTS, contents

from data_pipeline.errors import UserError
from data_pipeline.exchange import export
from data_pipeline.exchange.export import export_megatron, export_parquet
from data_pipeline.exchange.imports import import_tokens
from data_pipeline.exchange.plan import plan_import
from data_pipeline.prepare.plan import Settings, plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.sources.reading import Reading
from data_pipeline.tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> ShardSet:
    """Two sources, three shards."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "a.txt").write_text("\n".join(TEXTS[:30]))
    (folder / "b.txt").write_text("\n".join(TEXTS[30:50]))
    settings = Settings(Reading(text_unit="line"), shard_tokens=350)
    plan = plan_preparation([folder / "a.txt", folder / "b.txt"], small_tokenizer, settings)
    found = prepare(plan, folder / "shards").shards
    assert found is not None
    assert len(found.manifest.shards) == 3
    return found


def ids_of(shards: ShardSet) -> list[list[int]]:
    return [document.tolist() for document in shards.documents()]


def ended(shards: ShardSet) -> list[list[int]]:
    return [[*document, shards.eos_id] for document in ids_of(shards)]


def test_megatron_bytes_are_those_of_its_own_builder(shards: ShardSet, tmp_path: Path) -> None:
    done = export_megatron(shards, tmp_path / "new" / "ours")
    assert (done.documents, done.tokens) == (50, shards.num_tokens)
    write_megatron(tmp_path / "theirs", [[document] for document in ended(shards)])
    for end in (".bin", ".idx"):
        theirs = (tmp_path / f"theirs{end}").read_bytes()
        assert (tmp_path / "new" / f"ours{end}").read_bytes() == theirs
    assert sorted(contents(tmp_path / "new")) == ["ours.bin", "ours.idx"]


def test_megatron_there_and_back_gives_the_same_shards(
    shards: ShardSet, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    export_megatron(shards, tmp_path / "a")
    back = import_tokens(plan_import([tmp_path / "a"], small_tokenizer), tmp_path / "out").shards
    assert ids_of(back) == ids_of(shards)
    again = export_megatron(back, tmp_path / "b")
    assert again.ids_hash == export_megatron(shards, tmp_path / "a", overwrite=True).ids_hash
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_megatron_takes_int32_for_vocabularies_from_65500(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.exchange.export.MEGATRON_SMALL", 320)
    export_megatron(shards, tmp_path / "a")
    assert (tmp_path / "a.idx").read_bytes()[17] == 4
    assert np.fromfile(tmp_path / "a.bin", "<i4").tolist() == list(itertools.chain(*ended(shards)))
    assert struct.unpack_from("<q", (tmp_path / "a.idx").read_bytes(), 34 + 4 * 50 + 8)[0] == 4 * len(ended(shards)[0])


def test_parquet_holds_ids_sources_and_text(shards: ShardSet, tmp_path: Path) -> None:
    done = export_parquet(shards, tmp_path / "out", text=True, file_tokens=350, group_tokens=200)
    assert [path.name for path in done.files] == [
        "tokens-00000.parquet",
        "tokens-00001.parquet",
        "tokens-00002.parquet",
    ]
    assert all(pq.ParquetFile(path).num_row_groups > 1 for path in done.files[:2])
    table = pa.concat_tables([pq.read_table(path) for path in done.files])
    assert table.column("input_ids").to_pylist() == ended(shards)
    assert table.column("document").to_pylist() == list(range(50))
    assert table.column("source").to_pylist() == ["a.txt"] * 30 + ["b.txt"] * 20
    assert table.column("text").to_pylist() == TEXTS[:50]
    assert table.schema.field("input_ids").type.value_type == pa.uint16()
    metadata = pq.read_schema(done.files[0]).metadata
    assert metadata[b"nystrom.tokenizer_hash"].decode() == shards.tokenizer_hash
    assert metadata[b"nystrom.eos_id"].decode() == str(shards.eos_id)


def test_parquet_is_read_by_datasets(shards: ShardSet, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export_parquet(shards, tmp_path / "out", file_tokens=800)
    found = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert found["input_ids"][:] == ended(shards)
    assert found.column_names == ["document", "source", "input_ids"]


def test_what_is_there_is_kept(shards: ShardSet, tmp_path: Path) -> None:
    export_parquet(shards, tmp_path / "out", file_tokens=100)
    with pytest.raises(UserError, match=r"holds an export already \(tokens-00000.parquet\)"):
        export_parquet(shards, tmp_path / "out")
    assert len(export_parquet(shards, tmp_path / "out", overwrite=True).files) == 1
    assert sorted(contents(tmp_path / "out")) == ["tokens-00000.parquet"]
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"holds other files \(mine.txt\)"):
        export_parquet(shards, tmp_path / "out", overwrite=True)
    export_megatron(shards, tmp_path / "a")
    (tmp_path / "a.idx").unlink()
    with pytest.raises(UserError, match=r"a.bin is there already"):
        export_megatron(shards, tmp_path / "a")
    with pytest.raises(UserError, match=r"cannot be made"):
        export_megatron(shards, tmp_path / "a.bin" / "b")


def test_a_failed_export_leaves_no_file(shards: ShardSet, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    for call in (lambda: export_megatron(shards, tmp_path / "m" / "a", on_tokens=stop),
                 lambda: export_parquet(shards, tmp_path / "p", on_tokens=stop)):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            call()
    assert contents(tmp_path) == {}


def test_what_reads_back_otherwise_is_refused(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.publish

    def flip(tmp: Path, path: Path) -> None:
        if path.suffix == ".bin":
            data = bytearray(tmp.read_bytes())
            data[8] ^= 1
            tmp.write_bytes(data)
        real(tmp, path)

    monkeypatch.setattr(export, "publish", flip)
    with pytest.raises(UserError, match="does not read back as it was written"):
        export_megatron(shards, tmp_path / "a")


def test_damaged_shards_are_refused(shards: ShardSet, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards.path, copy)
    entry = shards.manifest.shards[1].tokens
    raw = bytearray((copy / entry.name).read_bytes())
    raw[-2:] = b"\x21\x00"  # the end token of the last document
    (copy / entry.name).write_bytes(raw)
    with pytest.raises(UserError, match=rf"{entry.name}: a document has no end token"):
        export_megatron(ShardSet.open(copy), tmp_path / "a")
