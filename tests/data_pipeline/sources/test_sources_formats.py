"""The register of formats: what a format must have, and what all of them share."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from data_pipeline.sources import format as registry
from data_pipeline.sources.format import Format, Found, Source, register
from data_pipeline.sources.reading import Wanted
from data_pipeline.sources.records import read_records


def reader(self: Format, source: Source, wanted: Wanted) -> Iterator[Found]:
    yield Found("x", 1)


def cutter(self: Format, *arguments: Any) -> list[Any]:
    return []


SOUND: dict[str, Any] = {"name": "toy", "suffixes": (".toy",), "unit": "line", "cut": "whole", "read": reader}


@pytest.fixture(autouse=True)
def own_register() -> Iterator[None]:
    with registry.FORMATS.registered():
        yield


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, r"format 'Toy' .* lacks name \(the name that users give\)"),
        ({"name": "to.y"}, "format to.y .*: its name must be"),
        ({"suffixes": None}, r"format 'toy' .* lacks suffixes \(a tuple .* such as \('.jsonl',\)"),
        ({"suffixes": ()}, "format toy .*: its suffixes must be a tuple of some"),
        ({"suffixes": ".toy"}, r"format toy .*: its suffixes must be a tuple of some, such as \('.toy',\), not '.toy'"),
        ({"suffixes": ("toy",)}, r"format toy .*: a suffix is a dot and small letters, such as '.toy', not 'toy'"),
        ({"suffixes": (".gz",)}, "format toy .*: a suffix is"),
        ({"read": None, "unit": None}, r"format 'toy' .* lacks unit \(.*\); read \(the reader of records\)"),
        ({"unit": "page"}, "format toy .*: its unit must be one of line, row, not 'page'"),
        ({"cut": None}, r"format 'toy' .* lacks cut \(where a file may be entered: whole, lines or own\)"),
        ({"opens": "url"}, "format toy .*: its opens must be one of stream, path, not 'url'"),
        ({"cut": "own"}, "format toy .*: cut = 'own' and a method 'pieces' belong together"),
        ({"pieces": cutter}, "format toy .*: cut = 'own' and a method 'pieces' belong together"),
        ({"cut": "lines", "opens": "path"}, "format toy .*: what is cut at lines is read as a stream"),
        ({"name": "jsonl"}, r"format 'jsonl' is registered twice: in data_pipeline\.sources\.formats\.jsonl and"),
        ({"suffixes": (".toy", ".csv")}, "format toy .*: files .csv are read by format csv"),
    ],
)
def test_a_format_that_lacks_a_part_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    parts = {name: part for name, part in {**SOUND, **changes}.items() if part is not None}
    with pytest.raises(UserError, match=message):
        register(type("Toy", (Format,), parts))
    assert registry.of_path(Path("a.toy")) is None


def test_a_sound_format_is_found_by_its_suffix_compressed_or_not(tmp_path: Path) -> None:
    register(type("Toy", (Format,), SOUND))
    (tmp_path / "a.TOY.gz").write_bytes(gzip.compress(b""))
    assert [(found.fields, found.place) for found in read_records(tmp_path / "a.TOY.gz", ("t",))] == [
        ({"t": "x"}, "line 1")
    ]
    assert {".toy", ".toy.gz", ".toy.zst"} <= set(registry.suffixes())
    register(type("Shut", (Format,), {**SOUND, "name": "shut", "suffixes": (".shut",), "opens": "path"}))
    assert registry.of_path(Path("a.shut")) is not None
    assert registry.of_path(Path("a.shut.gz")) is None
    assert registry.supported().endswith(".parquet, .shut")


def test_every_format_says_how_it_is_cut() -> None:
    cuts = {name: (form.cut, form.opens) for name, form in registry.formats().items()}
    assert cuts == {
        "csv": ("whole", "stream"),
        "tsv": ("whole", "stream"),
        "jsonl": ("lines", "stream"),
        "lines": ("lines", "stream"),
        "text": ("whole", "stream"),
        "parquet": ("own", "path"),
    }


def test_records_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"meta": {"text": "a"}, "n": 1}\n\n{"meta": null, "n": 2}\n{"n": 3}\n')
    found = read_records(path, ("meta.text", "n"), ("--text-field", ""))
    assert next(found) == ({"meta.text": "a", "n": 1}, "line 1")
    assert next(found) == ({"meta.text": None, "n": 2}, "line 3")
    with pytest.raises(UserError, match=r"a\.jsonl, line 4: no field 'meta\.text'; its fields are: n \(choose with --"):
        next(found)
    path.write_text("{}\n{oops\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not a JSON record: .*; mend the record or leave it out"):
        list(read_records(path, ()))
    for name, message in ((tmp_path, "is a folder"), (tmp_path / "b.jsonl", "does not exist"), (__file__, "kind")):
        with pytest.raises(UserError, match=message):
            next(read_records(name, ("text",)))
