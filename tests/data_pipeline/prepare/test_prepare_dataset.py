"""Datasets of the `datasets` library become the shards that the same texts in JSONL become."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from prepare_case import TEXTS, contents

from data_pipeline.errors import UserError
from data_pipeline.prepare.dataset import prepare_dataset, prepare_splits
from data_pipeline.prepare.plan import Settings, plan_stdin
from data_pipeline.prepare.run import PrepareOptions, prepare
from data_pipeline.quality.duplicates import Dedup
from data_pipeline.sources.reading import Reading
from data_pipeline.tokenization.tokenizer import Tokenizer

ROWS = [{"text": text, "number": number} for number, text in enumerate([*TEXTS[:30], None, " "])]


@pytest.fixture(scope="module")
def dataset() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "complete"):
        monkeypatch.setattr(f"data_pipeline.prepare.{module}.STDIN_UNIT_BYTES", 500)


def from_lines(rows: list[dict[str, Any]], tokenizer: Tokenizer, out: Path) -> dict[str, bytes]:
    """The folder that JSONL on standard input gives."""
    lines = "".join(json.dumps({"text": row["text"]}, ensure_ascii=False) + "\n" for row in rows).encode()
    prepare(plan_stdin("jsonl", tokenizer), out, stream=io.BytesIO(lines))
    return contents(out)


def stream() -> Iterator[dict[str, Any]]:
    yield from ROWS


def test_the_shards_are_those_of_jsonl(tmp_path: Path, dataset: datasets.Dataset, small_tokenizer: Tokenizer) -> None:
    expected = from_lines(ROWS, small_tokenizer, tmp_path / "lines")
    result = prepare_dataset(dataset, small_tokenizer, tmp_path / "rows")
    assert result.shards is not None
    assert (result.shards.num_documents, result.shards.manifest.empty_documents) == (30, 2)
    assert len(result.shards.manifest.shards) > 3
    assert contents(tmp_path / "rows") == expected
    iterable = datasets.IterableDataset.from_generator(stream)
    prepare_dataset(iterable, small_tokenizer.save(tmp_path / "tok").parent, tmp_path / "stream")
    assert contents(tmp_path / "stream") == expected
    again = prepare_dataset(iterable, small_tokenizer, tmp_path / "stream")
    assert again.already_complete
    with pytest.raises(UserError, match="shards of another <stdin>"):
        prepare_dataset(dataset.select(range(20)), small_tokenizer, tmp_path / "rows")


def test_order_and_choice_of_rows_are_those_of_the_dataset(
    tmp_path: Path, dataset: datasets.Dataset, small_tokenizer: Tokenizer
) -> None:
    chosen = dataset.shuffle(seed=1).select(range(5)).with_format("numpy")
    shards = prepare_dataset(chosen, small_tokenizer, tmp_path / "out").shards
    assert shards is not None
    found = [small_tokenizer.decode(ids) for ids in shards.documents()]
    assert found == [row["text"] for row in chosen.with_format(None) if row["text"] and row["text"].strip()]


def test_an_interrupted_run_resumes(tmp_path: Path, dataset: datasets.Dataset, small_tokenizer: Tokenizer) -> None:
    left = 2

    def stop(size: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(dataset, small_tokenizer, tmp_path / "out", on_text=stop)
    assert prepare_dataset(dataset, small_tokenizer, tmp_path / "out").units_reused == 2
    assert contents(tmp_path / "out") == from_lines(ROWS, small_tokenizer, tmp_path / "lines")


def test_other_columns_templates_and_sources(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    rows = [{"body": {"text": f"text {i}"}, "title": f"title {i}", "site": "ab"[i % 2]} for i in range(4)]
    dataset = datasets.Dataset.from_list(rows)
    shards = prepare_dataset(dataset, small_tokenizer, tmp_path / "body", text_field="body.text").shards
    assert shards is not None
    assert [small_tokenizer.decode(ids) for ids in shards.documents()] == [f"text {i}" for i in range(4)]
    settings = Settings(Reading(template="{title}: {body.text}", source_field="site"))
    shards = prepare_dataset(dataset, small_tokenizer, tmp_path / "both", settings=settings).shards
    assert shards is not None
    assert [small_tokenizer.decode(ids) for ids in shards.documents()] == [f"title {i}: text {i}" for i in range(4)]
    assert shards.document_sources(shards.manifest.shards[0].index)[0] == ["a", "b"]


def test_splits(tmp_path: Path, dataset: datasets.Dataset, small_tokenizer: Tokenizer) -> None:
    splits = datasets.DatasetDict(train=dataset, test=dataset.select(range(3)))
    found = prepare_splits(splits, small_tokenizer, tmp_path)
    assert {name: result.shards.num_documents for name, result in found.items() if result.shards} == {
        "train": 30,
        "test": 3,
    }
    assert (tmp_path / "train" / "manifest.json").is_file()
    assert list(prepare_splits(splits, small_tokenizer, tmp_path, names=["test"])) == ["test"]
    with pytest.raises(UserError, match="no split 'valid'; its splits: train, test"):
        prepare_splits(splits, small_tokenizer, tmp_path, names=["valid"])
    with pytest.raises(UserError, match=r"holds several datasets \(train, test\): take one"):
        prepare_dataset(splits, small_tokenizer, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prepare_dataset takes a single dataset"):
        prepare_splits(dataset, small_tokenizer, tmp_path / "out")  # type: ignore[arg-type]


def failing() -> Iterator[dict[str, Any]]:
    yield ROWS[0]
    raise OSError("the line is dead")


def test_what_cannot_be_prepared_is_refused(
    tmp_path: Path, dataset: datasets.Dataset, small_tokenizer: Tokenizer
) -> None:
    out = tmp_path / "out"
    for given, options, message in [
        (dataset, {"text_field": "body"}, "the dataset: no column 'body'; its columns are: text, number$"),
        (dataset, {"text_field": "number"}, "the dataset: column 'number' is not text but int64"),
        (dataset, {"settings": Settings(dedup=Dedup.parse("exact"))}, r"need files: write the dataset to some"),
        (dataset, {"how": PrepareOptions(ray="auto")}, r"need files: write the dataset to some"),
        (dataset.with_transform(lambda rows: rows), {}, "has a transform, which is not applied here"),
        (datasets.IterableDataset.from_generator(failing), {}, "the dataset cannot be read: .*the line is dead"),
        (
            datasets.IterableDataset.from_generator(stream),
            {"text_field": "x"},
            "the dataset: no column 'x'; its columns",
        ),
        (datasets.IterableDataset.from_generator(stream), {"text_field": "number"}, "'number' is not text but int"),
        (dataset.select([]), {}, "no documents: standard input holds no records"),
        (ROWS, {}, "list is no dataset of the datasets library"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare_dataset(given, small_tokenizer, out, **options)  # type: ignore[arg-type]
        assert not (out / "manifest.json").exists()
