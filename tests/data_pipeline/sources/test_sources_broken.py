"""Broken records are counted with their place and skipped; broken files are refused with their name."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.errors import UserError
from data_pipeline.sources.corpus import open_corpus
from data_pipeline.sources.documents import iter_documents, read_piece
from data_pipeline.sources.pieces import Piece
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.streams import piece_digest
from data_pipeline.sources.tally import Tally

PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def skipping(path: Path, reading: Reading | None = None) -> tuple[list[str], Tally]:
    """The texts of a file, whatever the share of broken records."""
    tally = Tally(max_bad_fraction=1)
    return [d.text for d in iter_documents(path, reading, tally)], tally


@pytest.mark.parametrize("codec", PACKERS)
@pytest.mark.parametrize(
    ("content", "line", "reason", "detail"),
    [
        (b'{"text": "a"}\n{"text": "b\n{"text": "c"}\n', 2, "not JSON", "not a JSON record: Invalid control|Untermin"),
        (b'{"text": "a"}\n{"text": "b', 2, "not JSON", r"Unterminated string starting at \(character 10\)"),
        (b'{"text": "a"} {"text": "b"}\n', 1, "not JSON", "Extra data.*one JSON object on each line is expected"),
        (b'["a", "b"]\n', 1, "not an object", "a record must be a JSON object with fields, one on each line, not list"),
        (b'{"text": "a"}\n{"body": "b", "id": 1}\n', 2, "no field", "no field 'text'; its fields are: body, id"),
        (b'{"b\\ud83d": "\\ud83d"}\n', 1, "no field", r"its fields are: b\?"),
        (b'{"text": "a"}\n\n{"text": 3}\n', 3, "not text", "field 'text' is not text but int"),
        (b'{"text": ["a"]}\n', 1, "not text", "not text but list"),
        (b'{"text": "a"}\n{"text": "b\xff"}\n', 2, "not UTF-8", r"invalid start byte, byte 12 of the line"),
        (b'{"text": "\xed\xa0\xbd"}\n', 1, "not UTF-8", "invalid continuation byte"),  # a surrogate in UTF-8
        (b'{"text": "a"}\n{"text": "b\\ud83d"}\n', 2, "surrogate", r"half a surrogate pair \(character 2"),
        (b"[" * 100_000, 1, "not JSON", "not a JSON record"),
        (b'{"text": 1' + b"0" * 5000 + b"}", 1, "not JSON", "not a JSON record"),
    ],
)
def test_a_broken_jsonl_record_is_skipped_and_named(
    tmp_path: Path, codec: str, content: bytes, line: int, reason: str, detail: str
) -> None:
    path = tmp_path / f"a.jsonl{codec}"
    path.write_bytes(PACKERS[codec](content))
    texts, tally = skipping(path)
    assert texts == [text for text in ("a", "c") if b'{"text": "%s"}\n' % text.encode() in content]
    assert tally.bad == Counter({reason: 1})
    assert (tally.documents, tally.records) == (len(texts), len(texts) + 1)
    [sample] = tally.bad_samples
    assert (sample.source, sample.record, sample.unit, sample.reason) == (path.name, line, "line", reason)
    assert re.search(detail, sample.detail)
    assert len(sample.excerpt) <= 200
    sample.detail.encode()
    sample.excerpt.encode()
    assert sample.offset == (None if codec else len(b"\n".join(content.split(b"\n")[: line - 1])) + (line > 1))
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}, line {line}: .*({detail})"):
        list(iter_documents(path, tally=Tally(max_bad_fraction=0)))


def test_a_broken_text_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xff fine\nfine again\n")
    texts, tally = skipping(tmp_path)
    assert texts == []
    assert (tally.bad_samples[0].record, tally.bad_samples[0].excerpt) == (2, "not \ufffd fine")
    assert "invalid start byte, byte 5 of the line" in tally.bad_samples[0].detail
    texts, tally = skipping(tmp_path, Reading(text_unit="line"))
    assert texts == ["fine", "fine again"]
    assert [(s.record, s.offset, s.reason) for s in tally.bad_samples] == [(2, 5, "not UTF-8")]
    (tmp_path / "a.txt").write_text("utf-16", encoding="utf-16")
    assert skipping(tmp_path)[1].bad == Counter({"not UTF-8": 1})


def test_broken_csv_records_are_named_with_the_line_where_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'id,text\n1,"two\nlines"\n2,too,many\n3\n\n4,"fine ""quoted"""\n5,\xff\n\xff,"not read"\n6,"x"y\n7,end\n'
    )
    texts, tally = skipping(path)
    assert texts == ["two\nlines", 'fine "quoted"', "not read", "end"]
    assert [(s.record, s.reason) for s in tally.bad_samples] == [
        (4, "wrong width"),
        (5, "wrong width"),
        (8, "not UTF-8"),
        (10, "not CSV"),
    ]
    advice = "; a field that holds a delimiter must be in double quotes"
    assert tally.bad_samples[0].detail == f"3 fields where the header has 2{advice}"
    assert tally.bad_samples[1].detail == "1 fields where the header has 2"
    assert all(s.excerpt.encode() or s.reason == "not CSV" for s in tally.bad_samples)


def test_a_csv_header_must_have_the_columns_once(tmp_path: Path) -> None:
    for header, message in (
        (b"id,body\n", "no column 'text'; its columns are: id, body"),
        (b"text,text\n", "more than one column 'text'"),
        (b'id,"x"y\n', "line 1: the header is not CSV"),
        (b"\xff,id\n", "no column 'text'"),
    ):
        (tmp_path / "a.csv").write_bytes(header + b"1,a\n")
        with pytest.raises(UserError, match=rf"a\.csv.* {message}"):
            skipping(tmp_path)


def test_broken_text_in_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    values = pa.array([b"one", b"two \xff", None, b"four", b"\xfe"] * 2, pa.binary())
    text = pa.Array.from_buffers(pa.string(), 10, values.buffers())  # not checked by Arrow
    pq.write_table(pa.table({"text": text, "n": list(range(10))}), tmp_path / "a.parquet", row_group_size=4)
    for reading, texts in ((Reading(), ["one", "four"] * 2), (Reading(template="{text}{n}"), None)):
        tally = Tally(max_bad_fraction=1)
        found = []
        for piece in open_corpus([tmp_path]).pieces(1, reading):
            found += [(d.text, d.record) for d in read_piece(piece, reading, tally)]
        assert found == (
            list(zip(texts, [1, 4, 6, 9], strict=True))
            if texts
            else [("one0", 1), ("2", 3), ("four3", 4), ("one5", 6), ("7", 8), ("four8", 9)]
        )
        assert [(s.record, s.unit, s.reason) for s in tally.bad_samples] == [
            (row, "row", "not UTF-8") for row in (2, 5, 7, 10)
        ]
        assert tally.bad_samples[0].excerpt == "two \ufffd"


def test_a_parquet_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    meta = pa.array([{"text": "a", "pages": 3}])
    pq.write_table(pa.table({"text": ["a"], "n": [1], "meta": meta, "raw": [b"a"]}), path)
    assert skipping(path, Reading("meta.text"))[0] == ["a"]
    assert skipping(path, Reading(template="{n} {meta.text} {meta.pages}"))[0] == ["1 a 3"]
    for reading, message in (
        (Reading("body"), r"a\.parquet: no column 'body'; its columns are: text, n, meta, raw"),
        (Reading("meta.title"), r"a\.parquet: no column 'meta.title'"),
        (Reading("text.a"), r"a\.parquet: no column 'text.a'"),
        (Reading("n"), "column 'n' is not text but int64"),
        (Reading("raw"), "column 'raw' is not text but binary"),
        (Reading("meta"), "column 'meta' is not text but struct"),
        (Reading("meta.pages"), "column 'meta.pages' is not text but int64"),
        (Reading(template="{text} {raw}"), "column 'raw' is not text but binary"),
    ):
        with pytest.raises(UserError, match=message):
            skipping(path, reading)
        with pytest.raises(UserError, match=message):  # by the plan: nothing has been read when it is told
            open_corpus([path]).pieces(1, reading)


def test_a_damaged_parquet_file_is_refused_also_by_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a" * i for i in range(500)] + ["a needle"]})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    for data in (whole[:-10], b"", b"not Parquet at all", whole[:100]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
            open_corpus([path]).pieces(100)
    at = whole.index(b"needle")  # only the checksum tells
    path.write_bytes(whole[:at] + b"b" + whole[at + 1 :])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        skipping(path)


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ('{"text": "été"}\n'.encode("latin-1"), "`iconv -f latin1 -t utf-8 FILE > NEW` rewrites text"),
        (b'[{"text": "a"}, {"text": "b"}]\n', "`jq -c '.\\[\\]' FILE > NEW.jsonl` writes a list's records"),
        (b'{"text": "cut\n', "--max-bad-fraction$"),
    ],
)
def test_what_helps_is_said(tmp_path: Path, data: bytes, remedy: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=remedy):
        list(iter_documents(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv"])
def test_compression_cut_short_anywhere_is_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    plain = b"text\n" + b"".join(json.dumps({"text": os.urandom(20).hex()}).encode() + b"\n" for _ in range(3000))
    whole = PACKERS[suffix](plain)
    path = tmp_path / f"a.{kind}{suffix}"
    size = len(whole)
    cuts = [0, 1, 2, 3, 5, 9, 12, 18, 100, size // 2, 1 << 14, size - 100, *range(size - 12, size)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        why = ".*" if cut else "the file is empty"
        cut_short = rf"{path.name}: the (gzip|zstd) compression is damaged or cut short: {why}; fetch or write"
        with pytest.raises(UserError, match=cut_short):
            skipping(path)
        path.write_bytes(whole + whole[:cut])  # the second of two members
        if cut:
            with pytest.raises(UserError, match="compression is damaged or cut short"):
                skipping(path)
    for damaged in (plain, whole + b"something else", whole[: size // 2] + bytes(100) + whole[size // 2 + 100 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{path.name}: the (gzip|zstd) compression is damaged"):
            skipping(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_file_that_is_gone_or_changed_since_the_plan_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": ["a"] * 10}), path, row_group_size=5)
    else:
        path.write_bytes(b'text\n{"text": "a"}\n' * 10)
    data = path.read_bytes()
    pieces = open_corpus([path]).pieces(100)
    for change, message in (
        (lambda: path.write_bytes(data[:-1]), "has changed since it was planned"),
        (lambda: path.write_bytes(data + b"\n"), "has changed since it was planned"),
        (path.unlink, "cannot be read: No such file"),
        (path.mkdir, "cannot be read: .*directory|has changed"),
    ):
        change()
        for piece in pieces:
            for consume in (lambda p: list(read_piece(p, Reading(), Tally(1))), piece_digest):
                with pytest.raises(UserError, match=message) as caught:
                    consume(piece)
                assert str(path) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 1_000_000)
    stream = iter_documents(path, Reading(text_unit="line"))
    next(stream)
    os.truncate(path, 100)
    with pytest.raises(UserError, match=r"a\.txt became shorter"):
        list(stream)


def test_what_has_no_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.sources.streams.MAX_LINE", 3 << 20)
    path = tmp_path / "a.txt"
    path.write_bytes(b"short\n" + b"x" * (5 << 20) + b"\n")
    with pytest.raises(UserError, match=r"a\.txt, byte 6: a line of more than 3,145,728 bytes"):
        skipping(path, Reading(text_unit="line"))
    with pytest.raises(UserError, match=r"a\.txt: more than 3,145,728 bytes in one document; choose lines"):
        skipping(path)
    monkeypatch.setattr("data_pipeline.sources.streams.MAX_LINE", 6 << 20)
    assert [len(text) for text in skipping(path, Reading(text_unit="line"))[0]] == [5, 5 << 20]


def test_a_piece_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(UserError, match="there is no format 'docx'"):
        list(read_piece(Piece("a", str(tmp_path / "a"), "docx", 0, 1, None, 1), Reading(), Tally()))


def broken(path: Path, good: int, bad: int) -> None:
    path.write_bytes(b'{"text": "a"}\n' * good + b"broken\n" * bad)


def test_the_run_goes_on_up_to_the_fraction_that_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    broken(path, 99, 1)
    assert len(list(iter_documents(path, tally=Tally(0.01)))) == 99
    tally = Tally(0.0099)
    with pytest.raises(UserError) as caught:
        list(iter_documents(path, tally=tally))
    assert tally.documents == 99  # at the end
    message = str(caught.value)
    assert "1 of 100 records are broken (1 not JSON), more than the fraction 0.0099 that is allowed" in message
    assert f"{path}, line 100: not a JSON record" in message


def test_the_message_counts_by_reason_and_shows_the_first_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 10 + b'{"text": 1}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n' * 100 + b"broken\n" * 5)
    tally = Tally()
    for piece in open_corpus([tmp_path]).pieces(700):
        list(read_piece(piece, Reading(), tally))
    with pytest.raises(UserError) as caught:
        tally.check()
    for part in (
        "6 of 116 records are broken (5 not JSON, 1 not text)",
        f"{tmp_path}/a.jsonl, line 11: field 'text' is not text but int",
        f"{tmp_path}/b.jsonl, line 101: not a JSON record",  # its piece begins in the middle of the file
        f"{tmp_path}/b.jsonl, line 102: not a JSON record",
        "--max-bad-fraction",
    ):
        assert part in str(caught.value)
    assert "line 103" not in str(caught.value)


def test_a_hopeless_input_is_given_up_early(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    broken(path, 1000, 10_000)
    tally = Tally(0.001)
    with pytest.raises(UserError, match=r"100 of 1,100 records"):
        list(iter_documents(path, tally=tally))
    assert tally.bad.total() == 100
    tally = Tally(0.02)  # ten times that is passed after 250 of 1,250
    with pytest.raises(UserError, match=r"251 of 1,251 records"):
        list(iter_documents(path, tally=tally))
    assert skipping(path)[1].bad.total() == 10_000


def test_samples_are_bounded_for_each_piece(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        broken(tmp_path / name, 0, 250)
    _, tally = skipping(tmp_path)
    assert Counter(s.source for s in tally.bad_samples) == {"a.jsonl": 100, "b.jsonl": 100}
    assert tally.bad == Counter({"not JSON": 500})
