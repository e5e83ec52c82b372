"""Fields, templates and normal forms."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import UserError
from data_pipeline.sources.documents import iter_documents
from data_pipeline.sources.reading import Bad, Reading, parse_template

RECORD: dict[str, Any] = {
    "title": "T",
    "body": "B {not a field}",
    "meta": {"title": "M", "deep": {"er": "D"}, "none": None},
    "meta.literal": "L",
    "none": None,
    "year": 1999,
    "score": 0.5,
    "ok": True,
    "list": ["x"],
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{title}\n\n{body}", "T\n\nB {not a field}"),
        (r"{title}\n\n{body}", "T\n\nB {not a field}"),
        (r"{title}\t\\n \x", None),
        ("{{{title}}} {{}}", "{T} {}"),
        ("{meta.title}/{meta.deep.er}", "M/D"),
        ("{meta.literal}", "L"),
        ("a{none}b{meta.none}c{meta.none.below}", "abc"),
        ("{year} {score} {ok}", "1999 0.5 true"),
        ("{title}{title}", "TT"),
    ],
)
def test_templates_join_fields(template: str, text: str | None) -> None:
    assert Reading(template=template).text_of(RECORD) == ("T\t\\n \\x" if text is None else text)


@pytest.mark.parametrize(
    ("reading", "reason", "detail"),
    [
        (Reading(template="{title} {missing}"), "no field", "no field 'missing'; its fields are: title, body"),
        (Reading(template="{meta.missing}"), "no field", "no field 'meta.missing'"),
        (Reading(template="{title.inside}"), "no field", "no field 'title.inside'"),
        (Reading(template="{list}"), "not text", "field 'list' is not text but list"),
        (Reading(template="{meta}"), "not text", "field 'meta' is not text but dict"),
        (Reading("year"), "not text", "field 'year' is not text but int"),
        (Reading("meta.missing"), "no field", "no field 'meta.missing'"),
    ],
)
def test_a_record_without_the_fields_is_bad(reading: Reading, reason: str, detail: str) -> None:
    found = reading.text_of(RECORD)
    assert isinstance(found, Bad)
    assert found.reason == reason
    assert found.detail.startswith(detail)


def test_a_field_is_taken_by_its_literal_name_before_its_path() -> None:
    assert Reading("meta.title").text_of(RECORD) == "M"
    assert Reading("meta.title").text_of({**RECORD, "meta.title": "literal"}) == "literal"
    assert Reading("meta.title").text_of({"meta": None}) is None
    assert Reading("none").text_of(RECORD) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{title", "write {{ and }}"),
        ("title}", "write {{ and }}"),
        ("no field", "names no field"),
        ("{{title}}", "names no field"),
        ("{}", "names no field"),
        ("{title}{}", "the name of a field and nothing else"),
        ("{title!r}", "the name of a field and nothing else"),
        ("{title:>10}", "the name of a field and nothing else"),
    ],
)
def test_a_bad_template_is_refused_at_once(template: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^template ") as caught:
        Reading(template=template)
    assert message in str(caught.value)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(UserError, match="text unit 'word' is unknown; known are: file, line"):
        Reading(text_unit="word")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="normalisation 'NFC' is unknown; known are: nfc, nfd, nfkc, nfkd"):
        Reading(normalize="NFC")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no name"):
        Reading("")


def test_a_template_is_parsed_once() -> None:
    parse_template.cache_clear()
    reading = Reading(template="{a} {b}")
    for _ in range(5):
        reading.text_of({"a": "1", "b": "2"})
    assert parse_template.cache_info().misses == 1


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, **kw: asked.append(kw["columns"]) or plain(self, **kw)
    )
    table = {"title": ["t"], "meta": [{"id": 1, "n": {"x": "y", "z": 2}}], "a.b": ["literal"], "other": [b"1"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    reading = Reading(template="{title} {meta.id} {meta.n.x} {a.b} {title}")
    assert [d.text for d in iter_documents(tmp_path, reading)] == ["t 1 y literal t"]
    assert asked == [["title", "meta.id", "meta.n.x", "a.b"]]


def test_templates_work_for_every_kind_of_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "x", "text": "y"}\n')
    (tmp_path / "b.csv").write_text("text,id,title\ny,1,x\n")
    pq.write_table(pa.table({"title": ["x"], "text": ["y"]}), tmp_path / "c.parquet")
    reading = Reading(template=r"{title}:\n{text}")
    assert [d.text for d in iter_documents(tmp_path, reading)] == ["x:\ny"] * 3


@pytest.mark.parametrize("form", ["nfc", "nfd", "nfkc", "nfkd"])
def test_text_is_normalised_only_when_asked(tmp_path: Path, form: Any) -> None:
    text = "e\u0301 \u00e9 \ufb01 \u212b \uac00 \ufeff"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert [d.text for d in iter_documents(tmp_path)] == [text]
    [document] = iter_documents(tmp_path, Reading(normalize=form))
    assert document.text == unicodedata.normalize(form.upper(), text) != text
    assert document.size == len(document.text.encode())
