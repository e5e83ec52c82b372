"""Documents out of files of every kind, and what is said about files that are broken."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import UserError
from data_pipeline.sources.documents import Counts, expand_inputs, iter_documents
from data_pipeline.sources.inputs import relative_names

TEXTS = ["plain", "Zeilen\nund\r\nmehr", "2020-01-01", "42", "null", "\u2028\x0c\x85 odd breaks", "é 😀 \x00 <mask>"]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def texts_of(path: Path, **options: str) -> list[str]:
    return [document.text for document in iter_documents(path, **options)]


def write_jsonl(path: Path) -> None:
    path.write_bytes(jsonl(TEXTS))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(jsonl(TEXTS)))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path)


@pytest.mark.parametrize(
    ("name", "write"), [("a.jsonl", write_jsonl), ("a.jsonl.gz", write_gzip), ("a.parquet", write_parquet)]
)
def test_texts_come_through_unchanged(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    counts = Counts()
    documents = list(iter_documents(tmp_path / name, counts=counts))
    assert [d.text for d in documents] == TEXTS  # in particular what looks like a date or a number stays text
    assert [d.record for d in documents] == list(range(1, len(TEXTS) + 1))
    assert counts == Counts(len(TEXTS), 0, sum(len(t.encode()) for t in TEXTS))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    text = "first\n\nsecond\u2028third\x0c\x85 é\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfdos\r\nlines\r\n")  # byte order mark and CRLF
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert [(d.text, d.path) for d in iter_documents(paths)] == [(text, paths[0]), ("dos\nlines\n", paths[1])]


def test_many_text_files_keep_their_order_among_other_files(tmp_path: Path) -> None:
    paths = []
    for i in range(300):  # more than are opened at once
        path = tmp_path / f"{i:03d}.{'jsonl' if i == 100 else 'txt'}"
        path.write_bytes(jsonl([f"text {i}"]) if i == 100 else f"text {i}".encode())
        paths.append(path)
    assert [(d.text, d.path) for d in iter_documents(paths)] == [(f"text {i}", p) for i, p in enumerate(paths)]


def test_documents_without_text_are_counted_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a"}\n{"text": null}\n\n{"text": " \\n"}\n{"text": ""}\n{"text": "b"}\n'
    )
    pq.write_table(pa.table({"text": [None, "c", " "]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("")
    counts = Counts()
    found = [d.text for d in iter_documents(sorted(tmp_path.iterdir()), counts=counts)]
    assert found == ["a", "b", "c"]
    assert counts == Counts(documents=3, empty=6, text_bytes=3)


def test_an_empty_jsonl_file_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert texts_of(tmp_path / "a.jsonl") == []


def test_other_field_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"], field="body"))
    pq.write_table(pa.table({"body": pa.array(["y", "y"]).dictionary_encode()}), tmp_path / "b.parquet")
    assert texts_of(tmp_path / "a.jsonl", text_field="body") == ["x"]
    assert texts_of(tmp_path / "b.parquet", text_field="body") == ["y", "y"]


@pytest.mark.parametrize("name", ["a[1].jsonl", "b*?.jsonl", "c#%20 d.jsonl", ".hidden/e.jsonl", "ü😀.jsonl"])
def test_odd_file_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(jsonl(["x"]))
    (tmp_path / "a1.jsonl").write_bytes(jsonl(["not this one"]))
    assert texts_of(path) == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b\n{"text": "c"}\n', "line 2: not a JSON record"),
        (b'{"text": "a"}\n{"text": "b', "line 2: not a JSON record"),
        (b'{\n"text": "a"\n}\n', r"line 1: not a JSON record.*one JSON object on each line"),
        (b'["a", "b"]\n', "line 1: a record must be a JSON object with fields, not list"),
        (b'{"text": "a"}\n{"body": "b", "id": 1}\n', "line 2: no field 'text'; its fields are: body, id"),
        (b'{"text": "a"}\n\n{"text": 3}\n', "line 3: field 'text' is not text but int"),
        (b'{"text": ["a"]}\n', "line 1: field 'text' is not text but list"),
        (b'{"text": "a"}\n{"text": "b\xff"}\n', "line 2: not UTF-8"),
        (b'{"text": "a"}\n{"text": "\\ud83d"}\n', "record 2: the text has half a surrogate pair"),
        (b"[" * 100_000, "line 1: not a JSON record"),
    ],
)
def test_broken_jsonl_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    for name, data in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            texts_of(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(jsonl([os.urandom(40).hex() for _ in range(5000)]))
    path.write_bytes(whole[:-2000])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: the gzip compression is damaged or cut short"):
        texts_of(path)
    path.write_bytes(jsonl(["not compressed at all"]))
    with pytest.raises(UserError, match="the gzip compression is damaged"):
        texts_of(path)
    path.write_bytes(whole[:5000] + bytes(100) + whole[5100:])
    with pytest.raises(UserError, match=str(path)):
        texts_of(path)


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'body'; its columns are: text, n"):
        texts_of(path, text_field="body")
    with pytest.raises(UserError, match="column 'n' is not text but int64"):
        texts_of(path, text_field="n")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        texts_of(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        texts_of(path)


def test_broken_text_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"fine\nnot \xff fine\n")
    with pytest.raises(UserError, match=r"b\.txt, line 2: not UTF-8 \(invalid start byte, byte 5 of the line\)"):
        list(iter_documents([tmp_path / "a.txt", tmp_path / "b.txt"]))


def test_unreadable_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        texts_of(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"not read; supported are \.jsonl"):
        texts_of(tmp_path / "a.docx")
    (tmp_path / "a::b.txt").write_text("x")
    with pytest.raises(UserError, match="rename it"):
        texts_of(tmp_path / "a::b.txt")


def test_streaming_starts_at_once_and_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as f:
        for _ in range(40):
            f.write(jsonl(["x" * 10_000] * 100))  # 40 MB
        f.write(b"broken\n")
    stream = iter_documents(path)
    assert next(stream).text == "x" * 10_000  # the broken line at the end was not read yet
    with pytest.raises(UserError, match="line 4001"):
        list(stream)
    assert not cache.exists()


def test_inputs_are_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.parquet", "sub/deep/d.jsonl.gz", "sub/notes.md", ".git/e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    names = ["a.txt", "b.jsonl", "sub/c.parquet", "sub/deep/d.jsonl.gz"]
    assert relative_names(expand_inputs([tmp_path])) == names
    assert relative_names(expand_inputs([f"{tmp_path}/*.txt", f"{tmp_path}/b.jsonl", f"{tmp_path}/sub/**/*"])) == names
    assert relative_names(expand_inputs([f"{tmp_path}/sub", tmp_path, f"{tmp_path}/a.txt"])) == names  # each once
    assert relative_names(expand_inputs([f"{tmp_path}/sub/c.parquet"])) == ["c.parquet"]


def test_inputs_that_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    for given, message in (
        (tmp_path / "none.txt", "does not exist"),
        (f"{tmp_path}/*.txt", "matches no file"),
        (tmp_path, "has no file to read"),
        (tmp_path / "notes.md", "files of this kind are not read"),
    ):
        with pytest.raises(UserError, match=message):
            expand_inputs([given])
    with pytest.raises(UserError, match="no inputs"):
        expand_inputs([])
