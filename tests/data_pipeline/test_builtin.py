"""The standard library as a corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline import builtin
from data_pipeline.builtin import StdlibCorpus, collect_stdlib, write_stdlib_corpus
from data_pipeline.errors import UserError

NAMES = ("train.jsonl", "valid.jsonl", "classify-train.jsonl", "classify-test.jsonl")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> StdlibCorpus:
    return write_stdlib_corpus(tmp_path_factory.mktemp("stdlib"))


def records(corpus: StdlibCorpus, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (corpus.folder / name).read_text(encoding="utf-8").splitlines()]


def test_it_is_a_corpus_of_source_and_documentation(corpus: StdlibCorpus) -> None:
    train, valid = records(corpus, "train.jsonl"), records(corpus, "valid.jsonl")
    sources = [record["source"] for record in train + valid]
    assert len(sources) == len(set(sources)) > 300
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(sources)
    assert not any("/test/" in s or "/tests/" in s or s.startswith("test/") or "site-packages" in s for s in sources)
    assert "pydoc_data/topics.py" not in sources
    assert all(len(record["text"].strip()) >= builtin.SMALLEST for record in train + valid)
    text = sum(len(record["text"]) for record in train)
    assert text > 3_000_000
    assert 0.05 < sum(len(record["text"]) for record in valid) / text < 0.35


def test_the_classification_test_set_was_not_pretrained_on(corpus: StdlibCorpus) -> None:
    train = {record["text"] for record in records(corpus, "train.jsonl")}
    valid = {record["text"] for record in records(corpus, "valid.jsonl")}
    assert {record["text"] for record in records(corpus, "classify-train.jsonl")} <= train
    test = records(corpus, "classify-test.jsonl")
    assert {record["text"] for record in test} <= valid
    assert all(record["label"] == record["source"].split("/")[0] for record in test)


def test_every_class_is_in_both_parts(corpus: StdlibCorpus) -> None:
    train, test = records(corpus, "classify-train.jsonl"), records(corpus, "classify-test.jsonl")
    assert len(corpus.labels) >= 4
    assert {r["label"] for r in train} == {r["label"] for r in test} == set(corpus.labels)
    for label, modules in corpus.labels.items():
        assert modules >= builtin.LABEL_MODULES
        share = sum(r["label"] == label for r in test) / modules
        assert abs(share - builtin.LABELLED_VALID_SHARE) < 0.5 / modules + 1e-9
    majority = max(sum(r["label"] == label for r in test) for label in corpus.labels) / len(test)
    assert majority < 0.6


def test_it_is_deterministic_and_leaves_equal_files_alone(corpus: StdlibCorpus, tmp_path: Path) -> None:
    again = write_stdlib_corpus(tmp_path / "new" / "folder")
    assert again.changed
    for name in NAMES:
        assert (again.folder / name).read_bytes() == (corpus.folder / name).read_bytes()
    stamps = [(again.folder / name).stat().st_mtime_ns for name in NAMES]
    assert not write_stdlib_corpus(again.folder).changed
    assert stamps == [(again.folder / name).stat().st_mtime_ns for name in NAMES]
    (again.folder / "valid.jsonl").write_text("cut short")
    assert write_stdlib_corpus(again.folder).changed
    assert (again.folder / "valid.jsonl").read_bytes() == (corpus.folder / "valid.jsonl").read_bytes()


def make_stdlib(root: Path, modules: int) -> None:
    (root / "pack" / "test").mkdir(parents=True)
    (root / "site-packages").mkdir()
    for i in range(modules):
        (root / "pack" / f"m{i}.py").write_text(f"# module {i}\n" + "x = 1\n" * 100)
    (root / "pack" / "__init__.py").write_text("")
    (root / "pack" / "latin.py").write_bytes(b"# \xe9\n" * 200)
    (root / "pack" / "test" / "test_m.py").write_text("y = 2\n" * 100)
    (root / "site-packages" / "other.py").write_text("z = 3\n" * 100)


def test_parts_that_are_missing_or_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_stdlib(tmp_path, 30)
    monkeypatch.setattr(builtin, "_stdlib_folder", lambda: tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)  # as where a distribution leaves it out
    assert sorted(d.name for d in collect_stdlib()) == sorted(f"pack/m{i}.py" for i in range(30))
    with pytest.raises(UserError, match="only 30 documents"):
        write_stdlib_corpus(tmp_path / "out")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        write_stdlib_corpus(tmp_path / "file")
