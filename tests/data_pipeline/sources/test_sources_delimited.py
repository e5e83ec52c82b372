"""CSV and TSV: what a quote is, and that no row is lost in silence. The counts are those of the files as written."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.sources.documents import iter_documents
from data_pipeline.sources.reading import Quotes, Reading
from data_pipeline.sources.records import read_records
from data_pipeline.sources.tally import Tally

ROWS = 20_000
STRAY = 5_000


def sentences(quote: str = '"') -> list[str]:
    return [f"{quote}Well, he began" if i == STRAY else f"sentence {i}" for i in range(ROWS)]


def skipping(path: Path, quotes: Quotes = "auto", field: str = "text") -> tuple[list[str], Tally]:
    tally = Tally(max_bad_fraction=1)
    return [d.text for d in iter_documents(path, Reading(field, quotes=quotes), tally)], tally


def records(path: Path, *fields: str, quotes: Quotes = "auto") -> list[tuple[str, ...]]:
    return [(found.place, *found.fields.values()) for found in read_records(path, fields, quotes=quotes)]


def test_a_quote_in_tsv_is_text_and_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "g.tsv"
    path.write_text("id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(sentences())))
    texts, tally = skipping(path)
    assert texts == sentences()
    assert (tally.records, tally.bad.total()) == (ROWS, 0)
    path.write_text('text\tlabel\n"To be\t1\nsecond\t0\nthird, said she"\t1\n')
    expected = [("line 2", '"To be', "1"), ("line 3", "second", "0"), ("line 4", 'third, said she"', "1")]
    assert records(path, "text", "label") == expected
    assert skipping(path)[0] == [text for _, text, _ in expected]


def test_tsv_follows_its_definition(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'\xef\xbb\xbftext\tid\r\na\\tb\t1\r\n\n\t2\nold\rmac\t3\n""\t4\n"x"y\t5')
    expected = [r"a\tb", "", "old\rmac", '""', '"x"y']  # no escapes either
    assert [text for _, text in records(path, "text")] == expected
    assert [place for place, _ in records(path, "text")] == ["line 2", "line 4", "line 5", "line 6", "line 7"]
    texts, tally = skipping(path)
    assert texts == [text for text in expected if text]
    assert (tally.records, tally.empty) == (5, 1)


def test_tsv_that_is_quoted_says_so_and_is_read_when_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    out = io.StringIO(newline="")
    csv.writer(out, delimiter="\t").writerows([["text", "id"], ["two\nlines", 1], ["a\ttab", 2], ['a "word"', 3]])
    path.write_text(out.getvalue())
    assert [text for _, text in records(path, "text", quotes="csv")] == ["two\nlines", "a\ttab", 'a "word"']
    advice = r"line 2: 1 fields where the header has 2; quotes are text here, --quotes csv reads them"
    with pytest.raises(UserError, match=advice):
        records(path, "text")
    assert skipping(path)[1].bad == Counter({"wrong width": 2})  # lines" and its id fit the header
    path.write_text('"text"\t"id"\n"a"\t"1"\n')  # as R writes
    with pytest.raises(UserError, match=r"no column 'text'; its columns are: .text., .id. .*; --quotes csv takes"):
        skipping(path)
    assert skipping(path, "csv")[0] == ["a"]


def test_a_quote_that_is_open_at_the_end_of_csv_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(sentences())).replace(", he", " he"))
    message = rf"a\.csv, line {STRAY + 2}: a quote opens .* never closes, .* \({ROWS - STRAY:,} lines\).*--quotes none"
    with pytest.raises(UserError, match=message):
        skipping(path)  # whatever share may be broken
    texts, tally = skipping(path, "none")
    assert (len(texts), texts[STRAY], tally.bad.total()) == (ROWS, '"Well he began', 0)
    path.write_text('id,text\n1,"')
    with pytest.raises(UserError, match=r"line 2: a quote opens"):
        skipping(path)


def test_rows_that_a_quote_swallowed_count_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [f"{i},{text}" for i, text in enumerate(sentences())]
    for end, reason in (
        (f'{STRAY + 1000},"quoted", more', "not CSV"),
        (f'{STRAY + 1000},said she",more', "wrong width"),
    ):
        lines[STRAY + 1000] = end
        path.write_text("\n".join(["id,text", *lines]) + "\n")
        texts, tally = skipping(path)
        assert len(texts) == ROWS - 1001
        assert (tally.records, tally.bad) == (ROWS, Counter({reason: 1001}))
        assert [sample.record for sample in tally.bad_samples[:2]] == [STRAY + 2, STRAY + 3]
        assert f"part of the broken record that begins on line {STRAY + 2}" in tally.bad_samples[1].detail
        with pytest.raises(UserError, match=rf"100 of 5,100 records are broken .*\n.*line {STRAY + 2}: "):
            list(iter_documents(path))


def test_csv_follows_rfc_4180(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\r\n"a ""b"", c\r\nd",1\r\nplain "word",0\r\n"",2\r\n')
    assert records(path, "text", "label") == [
        ("line 2", 'a "b", c\r\nd', "1"),
        ("line 4", 'plain "word"', "0"),
        ("line 5", "", "2"),
    ]
    assert records(path, "label", "label", quotes="csv")[0] == ("line 2", "1")


@pytest.mark.parametrize(("header", "row"), [("label,text", "1,good, if long"), ("text,label", "good, if long,1")])
def test_an_unquoted_comma_is_an_error_and_cuts_no_text(tmp_path: Path, header: str, row: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\n1,1\n{row}\n")
    message = (
        r"a\.csv, line 3: 3 fields where the header has 2; a field that holds a delimiter must be in double quotes"
    )
    with pytest.raises(UserError, match=message):
        records(path, "text", "label")
    assert skipping(path)[1].bad == Counter({"wrong width": 1})
