"""What is left out of the shards: broken records, documents that a filter or the search for duplicates drops."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_case import TEXTS, contents, plan

from data_pipeline.errors import UserError
from data_pipeline.prepare.plan import Settings, plan_preparation
from data_pipeline.prepare.run import PrepareOptions, prepare
from data_pipeline.quality.duplicates import Dedup
from data_pipeline.quality.filters import Filters
from data_pipeline.shards.shardset import verify_shards
from data_pipeline.sources.reading import Reading
from data_pipeline.tokenization.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("small_units")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def break_lines(file: Path, *numbers: int) -> None:
    text = file.read_text().splitlines()
    for number in numbers:
        text[number - 1] = text[number - 1][:-5]
    file.write_text("\n".join(text) + "\n")


def test_a_few_broken_records_are_counted_and_kept(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    break_lines(inputs / "2.jsonl", 7)
    break_lines(inputs / "5.jsonl", 1, 40)
    outcome = prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(max_bad_fraction=0.1))
    assert outcome.shards is not None
    manifest = outcome.shards.manifest
    assert manifest.bad_records == {"not JSON": 3}
    assert manifest.num_documents == len(TEXTS) - 3
    assert [(s["source"], s["record"]) for s in lines(tmp_path / "out" / "bad_records.jsonl")] == [
        ("2.jsonl", 7),
        ("5.jsonl", 1),
        ("5.jsonl", 40),
    ]
    assert verify_shards(tmp_path / "out") == []
    report = tmp_path / "out" / "bad_records.jsonl"
    report.write_bytes(report.read_bytes()[:-3])
    assert any("bad_records.jsonl" in fault for fault in verify_shards(tmp_path / "out"))


def test_too_many_broken_records_stop_the_run_and_the_mended_one_goes_on(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = (inputs / "3.jsonl").read_text()
    break_lines(inputs / "3.jsonl", 39)
    with pytest.raises(UserError, match=r"(?s)1 of \d+ records are broken.*3\.jsonl, line 39.*--max-bad-fraction"):
        prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    (inputs / "3.jsonl").write_text(whole)
    assert prepare(plan(inputs, small_tokenizer), tmp_path / "out").units_reused > 0
    prepare(plan(inputs, small_tokenizer), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_the_share_is_judged_over_all_units_but_a_unit_with_many_stops_at_once(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    break_lines(inputs / "0.jsonl", 1, 2)
    how = PrepareOptions(max_bad_fraction=0.01)
    assert prepare(plan(inputs, small_tokenizer), tmp_path / "out", how).units == 6  # 2 of 240, though 2 of 40 here
    break_lines(inputs / "0.jsonl", *range(3, 15))
    with pytest.raises(UserError, match=r"14 of 40 records are broken"):
        prepare(plan(inputs, small_tokenizer), tmp_path / "other", how)
    assert not list((tmp_path / "other").glob("tokens-00001*"))  # it did not go on


def test_a_wrong_field_stops_at_once_and_names_the_right_ones(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from data_pipeline.sources.reading import Reading

    with pytest.raises(UserError, match=r"0\.jsonl, line 1: no field 'body'; its fields are: text") as caught:
        prepare(plan(inputs, small_tokenizer, reading=Reading("body")), tmp_path / "out")
    assert "choose the text's field with --text-field" in str(caught.value)
    # The mended command needs no other folder: nothing was finished there.
    outcome = prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    assert (outcome.units_reused, outcome.documents) == (0, len(TEXTS))


def test_a_few_records_without_the_field_are_no_reason_to_choose_another(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    break_lines(inputs / "0.jsonl", 1, 2)
    with pytest.raises(UserError, match="2 of 240 records are broken") as caught:
        prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    assert "--text-field" not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_filters_say_what_they_dropped(workers: int, inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    filters = Filters.parse(["min-chars=40", "max-chars=120"])
    outcome = prepare(plan(inputs, small_tokenizer, filters=filters), tmp_path / "out", PrepareOptions(workers=workers))
    assert outcome.shards is not None
    kept = [text for text in TEXTS if 40 <= len(text) <= 120]
    assert [outcome.shards.tokenizer().decode(ids) for ids in outcome.shards.documents()] == kept
    short, long = sum(len(text) < 40 for text in TEXTS), sum(len(text) > 120 for text in TEXTS)
    assert outcome.shards.manifest.dropped_documents == {"min-chars": short, "max-chars": long}
    samples = lines(tmp_path / "out" / "dropped_documents.jsonl")
    assert {sample["reason"] for sample in samples} == {"min-chars", "max-chars"}
    assert all((sample["reason"] == "min-chars") == (sample["characters"] < 40) for sample in samples)  # type: ignore[operator]


def test_all_dropped_is_an_error_that_says_by_what(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="240 dropped by min-chars"):
        prepare(plan(inputs, small_tokenizer, filters=Filters.parse(["min-chars=10000"])), tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_of_equal_documents_stays(
    workers: int, inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    more = [*TEXTS[60:70], *TEXTS[60:65], "something new entirely"]
    (inputs / "9.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in more))
    preparation = plan(inputs, small_tokenizer, dedup=Dedup.parse("exact"))
    phases: list[str] = []
    outcome = prepare(preparation, tmp_path / "out", PrepareOptions(workers=workers), on_phase=phases.append)
    assert outcome.shards is not None
    texts = [outcome.shards.tokenizer().decode(ids) for ids in outcome.shards.documents()]
    assert texts == [*TEXTS, "something new entirely"]
    assert outcome.shards.manifest.dropped_documents == {"duplicate": 15}
    assert phases == ["signing", "comparing", "tokenizing"]
    again = prepare(preparation, tmp_path / "out")
    assert again.already_complete


def test_near_duplicates_are_dropped_too(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    words = " ".join(f"word{i}" for i in range(300))
    more = [words, words.replace("word7 ", "other "), " ".join(f"else{i}" for i in range(300))]
    (inputs / "9.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in more))
    preparation = plan(inputs, small_tokenizer, dedup=Dedup.parse("near"))
    outcome = prepare(preparation, tmp_path / "out")
    assert outcome.shards is not None
    texts = [outcome.shards.tokenizer().decode(ids) for ids in outcome.shards.documents()]
    assert more[0] in texts
    assert more[1] not in texts
    assert more[2] in texts


def test_filters_come_before_duplicates(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings = {"filters": Filters.parse(["min-chars=40"]), "dedup": Dedup.parse("exact")}
    (inputs / "9.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:50]))
    outcome = prepare(plan(inputs, small_tokenizer, **settings), tmp_path / "out")
    assert outcome.shards is not None
    short = [text for text in [*TEXTS, *TEXTS[:50]] if len(text) < 40]
    duplicate = [text for text in TEXTS[:50] if len(text) >= 40]
    assert outcome.shards.manifest.dropped_documents == {"duplicate": len(duplicate), "min-chars": len(short)}


def test_a_record_keeps_a_source_of_its_own(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In place of its file's name; that stays where the field is null, and for what is left out."""
    (tmp_path / "in").mkdir()
    records = [{"text": "one river", "meta": {"from": "web"}}, {"text": "two", "meta": None}, {"text": "three"}]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(
        pa.table({"text": ["four", "five"], "meta": [{"from": 7}, {"from": 8}]}), tmp_path / "in" / "b.parquet"
    )
    settings = Settings(reading=Reading(source_field="meta.from"))
    assert Reading().facts() == Reading(source_field=None).facts()
    assert "source_field" not in Reading().facts()  # what was made before is still recognised
    found = plan_preparation([tmp_path / "in"], small_tokenizer, settings)
    outcome = prepare(found, tmp_path / "out", PrepareOptions(max_bad_fraction=0.5))
    assert outcome.shards is not None
    sources: list[str] = []
    for shard in outcome.shards.manifest.shards:
        names, places = outcome.shards.document_sources(shard.index)
        sources += [names[place] for place in places]
    assert sources == ["web", "a.jsonl", "7", "8"]
    (bad,) = lines(tmp_path / "out" / "bad_records.jsonl")
    assert (bad["source"], bad["record"], bad["reason"]) == ("a.jsonl", 3, "no field")
