"""The seam for formats: a module in the package is all it takes for preparation and every evaluation to read it."""

from __future__ import annotations

import dataclasses
import gzip
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.cli import main
from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.sources import formats
from data_pipeline.sources.format import FORMATS
from data_pipeline.tokenization.training import train_tokenizer
from eval.shared.labelled import read_labelled
from eval.tasks.classification import ClassifySettings
from eval.tasks.classification.dataset import ClassifyData, sources
from eval.tasks.generation import GenerateSettings
from eval.tasks.generation.prompts import own_prompts
from eval.tasks.language_modeling import LMSettings
from eval.tasks.language_modeling.text import _texts

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
TEXTS = [f"the {word} number {i}" for i in range(150) for word in ("first", "other")]


@pytest.fixture
def bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of files in the format of docs/data.md, whose one module stands in the package."""
    (tmp_path / "more").mkdir()
    worked = re.search(r"```python\n(from data_pipeline\.sources\.format .*?)```", DOCS.read_text(), re.DOTALL)
    assert worked is not None
    (tmp_path / "more" / "bars.py").write_text(worked[1])
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "more")])
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.bars").write_text("".join(f"{i % 2}|{text}\n" for i, text in enumerate(TEXTS)))
    (data / "test.bars.gz").write_bytes(gzip.compress(b"0|a\n1|b\n"))
    with FORMATS.registered():
        FORMATS.refresh()
        yield data
    sys.modules.pop(f"{formats.__name__}.bars", None)


def test_a_module_is_all_that_a_format_needs(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = bars / "train.bars"
    monkeypatch.setattr("data_pipeline.prepare.plan.unit_bytes", lambda size: 2000)
    train_tokenizer(TEXTS, 300).save(tmp_path / "tokenizer")
    command = ["prepare", "--input", str(train), "--tokenizer", str(tmp_path / "tokenizer"), "--workers", "1"]
    assert not main([*command, "--out", str(tmp_path / "shards")])
    shards = ShardSet.open(tmp_path / "shards")
    assert [shards.tokenizer().decode(ids) for ids in shards.documents()] == TEXTS
    assert len(shards.manifest.shards) > 1  # it was cut at lines

    data = ClassifyData.read(sources(ClassifySettings(local_dir=str(bars))))
    assert (data.train.texts, data.train.labels) == (TEXTS, ["0", "1"] * 150)
    assert (data.test.texts, data.test.labels) == (["a", "b"], ["0", "1"])
    assert _texts(LMSettings(text=(str(train),))) == TEXTS
    assert own_prompts(GenerateSettings(prompts=str(train), prompt_field="text")) == TEXTS
    train.write_text("0|a\nb\n")
    with pytest.raises(UserError, match=r"train\.bars, line 2: no \| in the line"):
        read_labelled(train)


def test_classify_reads_tsv_and_csv_by_the_one_rule(tmp_path: Path) -> None:
    tsv = tmp_path / "a.tsv"
    tsv.write_text('text\tlabel\n"To be\t1\nsecond\t0\nthird, said she"\t1\n')
    data = read_labelled(tsv)
    assert (data.texts, data.labels) == (['"To be', "second", 'third, said she"'], ["1", "0", "1"])
    assert read_labelled(tsv, quotes="csv").labels == ["1"]  # as CSV has it, all is one field
    path = tmp_path / "a.csv"
    path.write_text("label,text\n1,fine\n0,dull, and long\n")
    with pytest.raises(UserError, match=r"a\.csv, line 3: 3 fields where the header has 2"):
        read_labelled(path)
    path.write_text('label,text\n1,"Well, he began\n0,dull\n')
    with pytest.raises(UserError, match=r"a\.csv, line 2: a quote opens in this record and never closes"):
        read_labelled(path)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"label": 1, "text": "fine"}\n')
    assert read_labelled(path).texts == ["fine"]  # also with a byte order mark


def test_held_out_text_loses_no_record_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 1499 + "broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1500: not a JSON record") as caught:
        _texts(LMSettings(text=(str(path),)))
    assert "--max-bad-fraction" not in str(caught.value)  # which eval does not have


def test_how_quotes_are_read_is_in_no_key() -> None:
    assert "quotes" not in ClassifySettings(quotes="csv").as_dict()


def test_shards_of_another_reading_are_not_taken_for_these(tmp_path: Path) -> None:
    text = "".join(f'{i}\ta "quoted" text {i}\n' for i in range(20))
    (tmp_path / "a.tsv").write_text("id\ttext\n" + text)
    train_tokenizer([text], 300).save(tmp_path / "tokenizer")
    command = ["prepare", "--input", str(tmp_path / "a.tsv"), "--tokenizer", str(tmp_path / "tokenizer")]
    command += ["--workers", "1", "--out", str(tmp_path / "shards")]
    assert not main(command)
    assert not main(command)  # nothing to do
    with pytest.raises(UserError, match="shards made with another quotes: None, now csv"):
        main([*command, "--quotes", "csv"])
    manifest = ShardSet.open(tmp_path / "shards").manifest
    assert manifest.settings["format_versions"] == {"tsv": 2}
    assert "quotes" not in manifest.settings["reading"]
    assert not main([*command, "--quotes", "csv", "--overwrite"])
    with pytest.raises(UserError, match="shards made with another quotes: csv, now None"):
        main(command)
    # As an earlier version left it, which read TSV with quotes and said nothing of formats.
    settings = {name: value for name, value in manifest.settings.items() if name != "format_versions"}
    older = dataclasses.replace(manifest, settings=settings)
    older.write(tmp_path / "shards")
    with pytest.raises(UserError, match="shards made with another format_versions: None"):
        main(command)
