"""Documents out of files of every kind, and which files an input stands for."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.errors import UserError
from data_pipeline.sources.corpus import open_corpus
from data_pipeline.sources.documents import iter_documents
from data_pipeline.sources.inputs import _walk
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.tally import Tally

TEXTS = ["plain", "Zeilen\nund\r\nmehr", "2020-01-01", "42", "null", "\u2028\x0c\x85 odd breaks", "é 😀 \x00 <mask>"]
LINES = [text for text in TEXTS if "\n" not in text]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def delimited(texts: list[str], delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text", "more"])
    writer.writerows((i, text, 'a "quoted" word') for i, text in enumerate(texts))
    return out.getvalue().encode()


def parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), out)
    return out.getvalue()


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


WRITERS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: jsonl(TEXTS),
    "a.JSONL": lambda: jsonl(TEXTS),
    "a.ndjson": lambda: jsonl(TEXTS),
    "a.json": lambda: jsonl(TEXTS),
    "a.jsonl.gz": lambda: gzip.compress(jsonl(TEXTS)),
    "a.json.gz": lambda: gzip.compress(jsonl(TEXTS[:3])) + gzip.compress(jsonl(TEXTS[3:])) + bytes(100),
    "a.jsonl.zst": lambda: zst(jsonl(TEXTS)),
    "b.jsonl.zst": lambda: zst(jsonl(TEXTS[:3])) + b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zst(jsonl(TEXTS[3:])),
    "a.parquet": lambda: parquet(TEXTS),
    "a.csv": lambda: delimited(TEXTS, ","),
    "a.csv.gz": lambda: gzip.compress(delimited(TEXTS, ",")),
    "a.csv.zst": lambda: zst(delimited(TEXTS, ",")),
    "a.tsv": lambda: delimited(TEXTS, "\t"),
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + jsonl(TEXTS),
    "bom.csv": lambda: b"\xef\xbb\xbf" + delimited(TEXTS, ","),
}


@pytest.mark.parametrize("name", WRITERS)
def test_texts_come_through_unchanged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WRITERS[name]())
    tally = Tally()
    quotes = "csv" if name.endswith(".tsv") else "auto"
    documents = list(iter_documents(tmp_path / name, Reading(quotes=quotes), tally))
    assert [d.text for d in documents] == TEXTS  # in particular what looks like a date or a number stays text
    assert {d.source for d in documents} == {name}
    assert [d.size for d in documents] == [len(t.encode()) for t in TEXTS]
    assert tally.text_bytes == sum(d.size for d in documents)
    assert (tally.documents, tally.records, tally.empty, tally.bad.total()) == (len(TEXTS), len(TEXTS), 0, 0)
    if "csv" not in name and "tsv" not in name:
        assert [d.record for d in documents] == list(range(1, len(TEXTS) + 1))
    else:  # the header is line 1, and one text has line ends in it
        assert [d.record for d in documents] == [2, 3, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document_or_one_for_each_line(tmp_path: Path, name: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zst}.get(Path(name).suffix, bytes)
    data = b"\xef\xbb\xbf" + "\r\n".join([*LINES, "", "old\rmac"]).encode()
    (tmp_path / name).write_bytes(pack(data))
    [document] = iter_documents(tmp_path / name)
    assert (document.text, document.record) == ("\n".join([*LINES, "", "old\nmac"]), 1)
    tally = Tally()
    documents = list(iter_documents(tmp_path / name, Reading(text_unit="line"), tally))
    assert [d.text for d in documents] == [*LINES, "old\rmac"]  # only \n ends a line, with \r before it or not
    assert [d.record for d in documents] == [1, 2, 3, 4, 5, 6, 8]
    assert (tally.empty, tally.records) == (1, 8)


def test_documents_without_text_are_counted_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a"}\n{"text": null}\n\n{"text": " \\n"}\n{"text": ""}\n{"text": "b"}\n'
    )
    pq.write_table(pa.table({"text": [None, "c", " "]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.csv").write_text('id,text\n1,d\n\n2,""\n3," "\n')
    for name in ("e.jsonl", "f.csv"):
        (tmp_path / name).write_text("")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "g.parquet")
    pq.write_table(pa.table({"text": pa.array([None, None])}), tmp_path / "h.parquet")
    tally = Tally()
    assert [d.text for d in iter_documents(tmp_path, tally=tally)] == ["a", "b", "c", "d"]
    assert (tally.documents, tally.empty, tally.records, tally.text_bytes) == (4, 10, 14, 4)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_text_type_of_parquet_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"body": pa.array(["y", None, "ü", "y"]).cast(kind)}), tmp_path / "b.parquet")
    assert [d.text for d in iter_documents(tmp_path, Reading("body"))] == ["y", "ü", "y"]


def test_a_large_row_group_of_long_texts_is_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{i} " + "x" * 5000 for i in range(300)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    monkeypatch.setattr("data_pipeline.sources.formats.parquet._BATCH_BYTES", 20_000)
    seen: list[int] = []
    plain = pa.RecordBatch.column
    monkeypatch.setattr(
        "data_pipeline.sources.formats.parquet._values",
        lambda batch, wanted: seen.append(batch.num_rows) or plain(batch, 0).to_pylist(),
    )
    assert [d.text for d in iter_documents(tmp_path)] == texts
    assert max(seen) <= 4


@pytest.mark.parametrize("name", ["a[1]", "b*?", "c#%20 d", ".hidden/e", "ü😀", "f::g", "s3:h", "file:i"])
def test_odd_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    for suffix, contents in ((".jsonl", jsonl), (".parquet", parquet)):
        Path(name + suffix).write_bytes(contents(["x"]))
        Path("a1" + suffix).write_bytes(contents(["not this one"]))
        assert [d.text for d in iter_documents(name + suffix)] == ["x"]


def test_streaming_starts_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as f:
        for _ in range(20):
            f.write(jsonl(["x" * 10_000] * 100))  # 20 MB
        f.write(b"broken\n")
    stream = iter_documents(path, tally=Tally(max_bad_fraction=0))
    assert next(stream).text == "x" * 10_000  # the broken line at the end was not read yet
    with pytest.raises(UserError, match="line 2001"):
        list(stream)


def names(*inputs: str | Path) -> list[str]:
    return [file.name for file in open_corpus(inputs).files]


def make(folder: Path, *paths: str) -> None:
    for name in paths:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def test_inputs_are_files_folders_and_patterns(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.txt", "sub/c.parquet", "sub/deep/d.jsonl.zst", "sub/notes.md", ".git/e.txt", "v.gz")
    expected = ["a.txt", "b.jsonl", "sub/c.parquet", "sub/deep/d.jsonl.zst"]
    assert names(tmp_path) == expected
    assert names(f"{tmp_path}/*.txt", f"{tmp_path}/b.jsonl", f"{tmp_path}/sub/**/*") == expected
    assert names(f"{tmp_path}/sub", tmp_path, f"{tmp_path}/a.txt") == expected  # each once
    assert names(f"{tmp_path}/sub/c.parquet") == ["c.parquet"]
    corpus = open_corpus([tmp_path])
    assert [(f.kind, f.bytes) for f in corpus.files] == [("text", 1), ("jsonl", 1), ("parquet", 1), ("jsonl.zst", 1)]
    assert corpus.files[0].mtime_ns == (tmp_path / "a.txt").stat().st_mtime_ns
    assert corpus.describe() == f"{tmp_path}/a.txt and 3 more file(s)"


def test_linked_files_and_folders_are_as_good_as_copies(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    make(blobs, "0a1b", "far/c.txt")
    snapshot.mkdir()
    for name in ("train-0.txt", "train-1.txt"):  # the hub's cache: equal contents, one blob
        (snapshot / name).symlink_to(blobs / "0a1b")
    (snapshot / "linked").symlink_to(blobs / "far")
    (snapshot / "loop").symlink_to(snapshot)
    expected = ["linked/c.txt", "train-0.txt", "train-1.txt"]
    assert names(snapshot) == expected
    assert len(list(_walk(snapshot))) == 3  # not once more each time around
    (snapshot / "loop").unlink()
    shutil.copytree(snapshot, tmp_path / "copy")
    assert names(tmp_path / "copy") == expected


def test_files_of_other_kinds_are_named_and_not_passed_over_in_silence(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl.bz2", "deep/c.jsonl.gz.1", "deep/d", ".hidden", ".git/config", "out/e.bin"):
        make(tmp_path, name)
    expected = (tmp_path / "b.jsonl.bz2", tmp_path / "deep/c.jsonl.gz.1", tmp_path / "deep/d")
    for given in ([tmp_path], [f"{tmp_path}/**"], [tmp_path / "a.txt", tmp_path]):
        corpus = open_corpus(given, without=tmp_path / "out")
        assert [file.name for file in corpus.files] == ["a.txt"]
        assert corpus.passed_over == expected
    assert open_corpus([f"{tmp_path}/*.txt"]).passed_over == ()


def test_token_files_are_sent_to_the_import(tmp_path: Path) -> None:
    make(tmp_path, "books.bin")
    make(tmp_path, "books.idx")
    for given in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(UserError, match="`nystrom data import` reads token files"):
            open_corpus([given])


def test_inputs_that_give_nothing_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "notes.md")
    for given, message in (
        (tmp_path / "none.txt", "does not exist"),
        (f"{tmp_path}/*.txt", "matches no file"),
        (tmp_path, "has no file to read"),
        (tmp_path / "notes.md", r"files of this kind are not read; supported are \.csv, \.json, \.jsonl, .*\.parquet"),
    ):
        with pytest.raises(UserError, match=message):
            open_corpus([given])
    with pytest.raises(UserError, match="no inputs"):
        open_corpus([])


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    try:
        with open(path, "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(UserError, match="not UTF-8; rename it"):
        open_corpus([tmp_path])


def test_zst_without_its_package_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.jsonl.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'nystrom-pretrain\[zstd\]'"):
        open_corpus([tmp_path])


def test_importing_the_readers_loads_no_heavy_library() -> None:
    code = (
        "import sys; import data_pipeline.sources.documents\n"
        "print([m for m in ('pyarrow', 'datasets', 'torch', 'numpy', 'zstandard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
