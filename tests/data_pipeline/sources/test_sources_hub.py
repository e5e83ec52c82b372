"""Datasets streamed through the datasets library, from folders laid out like datasets of the hub: no network."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import UserError
from data_pipeline.sources.corpus import open_dataset
from data_pipeline.sources.documents import Document, iter_documents, read_piece
from data_pipeline.sources.hub import HubDataset
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.streams import piece_digest
from data_pipeline.sources.tally import Tally

CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*.parquet
  - split: valid
    path: en/valid.parquet
- config_name: de
  data_files:
  - split: train
    path: de/*.parquet
---
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every attempt to reach another machine fails the test, also one that the library gets over."""
    attempts: list[Any] = []

    def refuse(*args: Any, **options: Any) -> NoReturn:
        attempts.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield attempts
    assert attempts == []


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    for name, texts in {
        "en/train-0": ["en 0 0", None, "en 0 2"],
        "en/train-1": ["2020-01-01", "en 1 1 é"],
        "en/train-2": [" ", "en 2 1"],
        "en/valid": ["en valid"],
        "de/train-0": ["de 0"],
    }.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = [{"title": f"title of {text}", "n": i} for i, text in enumerate(texts)]
        pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts, "meta": meta}), path)
    (folder / "README.md").write_text(CARD)
    return folder


EN = ["en 0 0", "en 0 2", "2020-01-01", "en 1 1 é", "en 2 1"]


def test_config_and_split_are_chosen(dataset: Path) -> None:
    for config, split, texts in (("en", "train", EN), ("en", "valid", ["en valid"]), ("de", "train", ["de 0"])):
        tally = Tally()
        found = iter_documents(open_dataset(str(dataset), config, split), tally=tally)
        assert [d.text for d in found] == texts
        assert tally.documents == len(texts)
    assert re.fullmatch(r"dataset books@[0-9a-f]{12}/en/train", open_dataset(str(dataset), "en").describe())
    assert open_dataset(str(dataset), "en").files == ()


def test_several_splits_follow_each_other(dataset: Path) -> None:
    corpus = open_dataset(str(dataset), "en", "valid+train")
    assert [d.text for d in iter_documents(corpus)] == ["en valid", *EN]
    assert re.fullmatch(r"dataset books@([0-9a-f]{12})/en/valid and books@\1/en/train", corpus.describe())
    names = [piece.name for piece in corpus.pieces(1)]
    assert len(set(names)) == len(names) == 4
    with pytest.raises(UserError, match="--split valid\\+valid names a split twice"):
        open_dataset(str(dataset), "en", "valid+valid")


def test_pieces_are_runs_of_the_datasets_shards(dataset: Path) -> None:
    pieces = open_dataset(str(dataset), "en").pieces(1000)
    assert [(p.kind, p.begin, p.end, p.total) for p in pieces] == [("hub", i, i + 1, 3) for i in range(3)]
    assert [re.sub("@[0-9a-f]{12}", "", p.name) for p in pieces] == [f"books/en/train/{i}-of-3" for i in range(3)]
    documents: list[Document] = []
    tally = Tally()
    digests = []
    for piece in pieces:
        documents += read_piece(pickle.loads(pickle.dumps(piece)), Reading(), tally)
        digests.append(tally.digest)
        assert piece_digest(piece) is None
    assert [d.text for d in documents] == EN
    assert [(d.source[-6:], d.record) for d in documents[:3]] == [("0-of-3", 1), ("0-of-3", 3), ("1-of-3", 1)]
    assert (tally.documents, tally.empty, tally.records) == (5, 2, 7)
    assert len(set(digests)) == 3


def test_shards_are_grouped_where_the_card_tells_their_size(dataset: Path) -> None:
    card = CARD.replace(
        "configs:",
        "dataset_info:\n- config_name: en\n  features:\n  - name: id\n    dtype: int64\n  - name: text\n"
        "    dtype: string\n  - name: meta\n    struct:\n    - name: title\n      dtype: string\n    - name: n\n"
        "      dtype: int64\n  splits:\n  - name: train\n    num_bytes: 3000\n    num_examples: 7\nconfigs:",
    )
    (dataset / "README.md").write_text(card)
    pieces = open_dataset(str(dataset), "en").pieces(2000)
    assert [(p.begin, p.end, p.size) for p in pieces] == [(0, 2, 2000), (2, 3, 1000)]
    assert [d.text for p in pieces for d in read_piece(p, Reading(), Tally())] == EN


def test_the_digest_is_that_of_the_texts(dataset: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str | None:
        tally = Tally()
        list(iter_documents(open_dataset(str(folder), "en"), tally=tally))
        return tally.digest

    before = digest(dataset)
    shutil.copytree(dataset, tmp_path / "elsewhere" / "books")
    assert digest(tmp_path / "elsewhere" / "books") == before
    last = dataset / "en/train-2.parquet"
    table = pq.read_table(last)
    pq.write_table(table, last, compression="none")
    assert digest(dataset) == before
    pq.write_table(table.set_column(1, "text", pa.array([" ", "en 2 2"])), last)
    assert digest(dataset) != before


def test_fields_and_templates_of_a_dataset(dataset: Path) -> None:
    corpus = open_dataset(str(dataset), "en", "valid")
    assert [d.text for d in iter_documents(corpus, Reading("meta.title"))] == ["title of en valid"]
    reading = Reading(template="{id} {meta.title}: {text}")
    assert [d.text for d in iter_documents(corpus, reading)] == ["0 title of en valid: en valid"]
    for wrong, message in (("body", "no column 'body'; its columns are: id, text, meta"), ("id", "not text but int64")):
        with pytest.raises(UserError, match=rf"dataset books@\w+/en/valid: .*{message}"):
            list(iter_documents(corpus, Reading(wrong)))


def test_a_folder_of_jsonl_files_is_a_dataset_too(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(3):
        (folder / f"train-{i}.jsonl").write_text("".join(json.dumps({"text": f"{i} {j}"}) + "\n" for j in range(4)))
    corpus = open_dataset(str(folder))
    assert len(corpus.pieces(1)) == 3
    assert [d.text for d in iter_documents(corpus)] == [f"{i} {j}" for i in range(3) for j in range(4)]
    (folder / "train-1.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"dataset plain@\w+/train cannot be read"):
        list(iter_documents(open_dataset(str(folder))))


def test_what_a_dataset_does_not_have_is_refused(dataset: Path) -> None:
    for config, split, message in (
        (None, "train", "pick one among the available configs.*'en', 'de'"),
        ("fr", "train", "'fr' not found. Available"),
        ("en", "test", r"Available splits: \['train', 'valid'\]"),
    ):
        with pytest.raises(UserError, match=rf"(?s)dataset books@\w+/.* cannot be read: .*{message}"):
            open_dataset(str(dataset), config, split).pieces(1000)
    with pytest.raises(UserError, match="is a folder, which has no revision 'v1'"):
        open_dataset(str(dataset), "en", revision="v1")


def test_shards_that_went_away_since_the_plan_are_noticed(dataset: Path) -> None:
    pieces = open_dataset(str(dataset), "en").pieces(1)
    (dataset / "en/train-2.parquet").unlink()
    with pytest.raises(UserError, match="has changed since it was planned: it has 2 shards, not 3"):
        list(read_piece(pieces[0], Reading(), Tally()))


def test_an_id_that_cannot_be_reached_is_named(no_network: list[Any]) -> None:
    with pytest.raises(UserError, match="dataset someone/something/train cannot be read") as caught:
        open_dataset("someone/something")
    assert "offline" in str(caught.value).lower()


def test_an_id_is_pinned_to_the_commit_of_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Info:
        sha = "0123abcd"

    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: asked.append((name, revision)) or Info
    )
    corpus = open_dataset("someone/something", "en", "valid", "v2")
    assert corpus.dataset == HubDataset("someone/something", "en", "valid", "0123abcd")
    assert asked == [("someone/something", "v2")]
    assert corpus.describe() == "dataset someone/something@0123abcd/en/valid"


def test_another_commit_and_other_files_are_another_dataset(dataset: Path, tmp_path: Path) -> None:
    commits = [HubDataset("a/b", None, "train", commit).name for commit in ("0123", "4567")]
    assert commits == ["a/b@0123/train", "a/b@4567/train"]
    before = open_dataset(str(dataset), "en").describe()
    moved = tmp_path / "elsewhere" / "books"
    moved.parent.mkdir()
    dataset.rename(moved)
    assert open_dataset(str(moved), "en").describe() == before
    file = moved / "en" / "valid.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    assert open_dataset(str(moved), "en").describe() != before


def test_streaming_leaves_no_cache(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    list(iter_documents(open_dataset(str(dataset), "en")))
    assert not cache.exists()
