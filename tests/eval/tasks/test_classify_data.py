"""Where labelled text comes from: hub datasets (as folders, no network), local folders, presets, hidden labels."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_pipeline.errors import UserError
from data_pipeline.sources.hub import HubDataset
from eval.shared import labelled
from eval.shared.labelled import Labelled, hub_dataset, pinned, read_labelled
from eval.suites.load import BUILT_IN, load_suites
from eval.tasks.classification import ClassifySettings
from eval.tasks.classification.dataset import ClassifyData, sources

FEATURES = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"]}
CARD = """---
dataset_info:
  features:
  - name: sentence1
    dtype: string
  - name: sentence2
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': different
          '1': same
configs:
- config_name: mrpc
  data_files:
  - split: train
    path: train.parquet
  - split: test
    path: test.parquet
---
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, labels in (("train", [0, 1, 0]), ("test", [-1, -1, -1])):
        pq.write_table(pa.table({**FEATURES, "label": labels}), folder / f"{name}.parquet")
    (folder / "README.md").write_text(CARD.replace("dataset_info:\n", "dataset_info:\n  config_name: mrpc\n"))
    return folder


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_dataset_gives_pairs_and_the_names_of_its_classes(hub_folder: Path) -> None:
    data = read_labelled(f"hub:{hub_folder}/mrpc:train", "sentence1", "label", "sentence2")
    assert (data.texts, data.seconds, data.labels) == (
        ["a", "b", "c"],
        ["d", "e", "f"],
        ["different", "same", "different"],
    )
    assert data.path.startswith("dataset pairs@")
    with pytest.raises(UserError, match=r"row 1: field 'label' is empty.*test on the validation split"):
        read_labelled(f"hub:{hub_folder}/mrpc:test", "sentence1", "label", "sentence2")
    with pytest.raises(UserError, match="no column 'text'; its columns are: sentence1, sentence2, label"):
        read_labelled(f"hub:{hub_folder}/mrpc:train")
    with pytest.raises(UserError, match="cannot be read"):
        read_labelled(f"hub:{hub_folder}/mrpc:dev", "sentence1")
    with pytest.raises(UserError, match="there is no folder"):
        read_labelled(f"hub:{hub_folder.parent}/none/mrpc:dev")


def test_names_of_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def resolve(*arguments: Any) -> HubDataset:
        asked.append(arguments)
        return HubDataset(*arguments[:3], "a" * 40)

    monkeypatch.setattr(labelled, "resolve_dataset", resolve)
    for source, expected in {
        "hub:imdb:train": ("imdb", None, "train", None),
        "hub:stanfordnlp/imdb:test": ("stanfordnlp/imdb", None, "test", None),
        "hub:nyu-mll/glue/cola:validation": ("nyu-mll/glue", "cola", "validation", None),
        "hub:nyu-mll/glue@v1/cola:train": ("nyu-mll/glue", "cola", "train", "v1"),
    }.items():
        hub_dataset(source)
        assert asked.pop() == expected
    fixed = pinned("hub:nyu-mll/glue/cola:train")
    assert fixed == f"hub:nyu-mll/glue@{'a' * 40}/cola:train"
    asked.clear()
    assert hub_dataset(fixed) == HubDataset("nyu-mll/glue", "cola", "train", "a" * 40)
    assert asked == []  # what is pinned is not asked for again
    assert (pinned(None), pinned("train.csv")) == (None, "train.csv")
    for wrong in ("hub:imdb", "hub:a/b/c/d:train", "hub:imdb:", "hub::train"):
        with pytest.raises(UserError, match="write it as hub:OWNER/NAME:SPLIT"):
            hub_dataset(wrong)


def test_without_the_hub_the_message_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"stanfordnlp/imdb.*cannot be read.*\n.*--local-dir DIR"):
        sources(ClassifySettings(train="hub:stanfordnlp/imdb:train", test="hub:stanfordnlp/imdb:test"))


def test_labels_that_are_not_public(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": -1}, {"text": "y", "label": -1}])
    with pytest.raises(UserError, match="every label is -1"):
        read_labelled(path)
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": None}])
    with pytest.raises(UserError, match="line 2: field 'label' is empty"):
        read_labelled(path)
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": -1}, {"text": "y", "label": 1}])
    assert read_labelled(path).labels == ["-1", "1"]  # sentiment from -1 to 1


def test_pairs_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x", "other": "y", "label": True}])
    data = read_labelled(path, text_b_field="other")
    assert (data.texts, data.seconds, data.labels) == (["x"], ["y"], ["True"])
    assert data.hash != read_labelled(path).hash
    with pytest.raises(UserError, match=r"no field 'b'.*--text-b-field"):
        read_labelled(path, text_b_field="b")


def test_ids_follow_content_and_copies_have_one() -> None:
    data = Labelled(["a", "b", "a", "a"], ["x", "x", "x", "y"], "file", "hash")
    ids = data.item_ids()
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    turned = Labelled(["b", "a", "a", "a"], ["x", "x", "y", "x"], "file", "hash").item_ids()
    assert sorted(turned) == sorted(ids)
    assert Labelled(["a"], ["x"], "file", "hash", ["b"]).item_ids() != ids[:1]
    assert data.take(np.array([1, 3])).labels == ["x", "y"]


def test_parts_of_a_local_folder(tmp_path: Path) -> None:
    records = [{"text": "x", "label": label} for label in "aabb"]
    write(tmp_path / "set" / "train.jsonl", records)
    (tmp_path / "set" / "test.csv").write_text("text,label\nq,a\n")
    settings = ClassifySettings(local_dir=str(tmp_path), local_name="set", train="hub:x:train", dev="hub:x:dev")
    found = sources(settings)
    assert found.train == str(tmp_path / "set" / "train.jsonl")
    assert found.test == str(tmp_path / "set" / "test.csv")
    assert found.dev is None
    dev = write(tmp_path / "set" / "dev.jsonl", records[:2])
    assert sources(settings).dev == dev
    data = ClassifyData.read(sources(settings))
    assert (len(data.train), len(data.test), len(data.dev or [])) == (4, 1, 2)
    assert data.describe()["dev_records"] == 2
    (tmp_path / "set" / "test.parquet").write_text("")
    with pytest.raises(UserError, match="are both there: keep one"):
        sources(settings)
    with pytest.raises(UserError, match=r"there is no .*other/train with \.csv, "):
        sources(settings.model_copy(update={"local_name": "other"}))
    with pytest.raises(UserError, match="--train FILE --test FILE"):
        sources(ClassifySettings(train="x.csv"))
    for name in ("train/pos", "train/neg", "test/pos", "test/neg"):
        (tmp_path / "folders" / name).mkdir(parents=True)
    found = sources(settings.model_copy(update={"local_name": "folders"}))
    assert (found.train, found.test) == (str(tmp_path / "folders" / "train"), str(tmp_path / "folders" / "test"))
    # Files in place of a suite's train and test: its dev split of the hub belongs to neither.
    assert sources(ClassifySettings(train="x.csv", test="y.csv", dev="hub:x:dev")).dev is None


def test_a_local_folder_and_files_named_too_contradict_each_other(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / f"{part}.jsonl", [{"text": "x", "label": 1}])
    local = {"local_dir": str(tmp_path), "train": "hub:x:train", "test": "hub:x:test"}
    for given, option in [
        ({"dev": "mine.jsonl"}, "--dev names the file mine.jsonl"),
        ({"train": "x.csv", "test": "y.csv"}, "--train names the file x.csv"),
        ({"test": "y.csv"}, "--test names the file y.csv"),
    ]:
        with pytest.raises(UserError, match=f"--local-dir .*{option}: leave one out"):
            sources(ClassifySettings(**(local | given)))  # type: ignore[arg-type]
    found = sources(ClassifySettings(**local))  # type: ignore[arg-type]
    assert sources(found) == found


def test_positive_label_and_a_draw_of_the_training_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": str(i), "label": "ab"[i % 2]} for i in range(40)])
    data = ClassifyData.read(ClassifySettings(train=path, test=path, train_records=10))
    assert len(data.train) == 10
    assert len(set(data.train.texts)) == 10
    assert data.positive(()) is None
    assert data.positive(("same", "b", "a")) == 1
    with pytest.raises(UserError, match=r"--positive-label same: .* has no such class, it has a, b"):
        data.positive(("same",))


def test_the_draw_is_by_class(tmp_path: Path) -> None:
    """Twenty classes, of which a draw without regard to them would miss some; one of them has a single record."""
    sizes = {f"c{i:02d}": 40 for i in range(18)} | {"many": 279, "once": 1}
    records = [{"text": f"{name} {i}", "label": name} for name, size in sizes.items() for i in range(size)]
    train = write(tmp_path / "train.jsonl", records)
    test = write(tmp_path / "test.jsonl", [{"text": "x", "label": name} for name in sizes])
    plain = ClassifySettings(train=train, test=test)

    def draw(**more: Any) -> ClassifyData:
        return ClassifyData.read(plain.model_copy(update=more))

    full = draw()
    for count in (39, 60, 500, 999):
        data = draw(train_records=count)
        assert data.classes == full.classes
        assert len(set(data.train.texts)) == len(data.train) == count
        numbers = np.bincount(data.numbers(data.train), minlength=20)
        assert (numbers >= [1 if name == "once" else 2 for name in data.classes]).all()
        if count >= 500:
            shares = [count * sizes[name] / 1000 for name in data.classes]
            assert np.abs(numbers - shares).max() <= 1
        assert draw(train_records=count) == data
    assert draw(train_records=1000).train == full.train
    assert (
        len({draw(train_records=count).describe()["hash"] for count in (39, 40, 1000)}) == 3
    )  # the key tells the draw
    with pytest.raises(UserError, match=r"--train-records 38 is too few for the 20 labels of .*at least 39, so that"):
        draw(train_records=38)
    assert len(draw(train_records=20, dev=test).train) == 20  # none to be held out
    with pytest.raises(UserError, match=r"--train-records 19 .*at least 20, so that there are 1 of each$"):
        draw(train_records=19, dev=test)


PRESETS = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
OURS = [name for name in PRESETS if load_suites([name])[0].task.name == "classify" and name != "glue"]


def test_the_presets_are_there() -> None:
    assert {"cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli", "imdb", "newsgroups", "arxiv"} <= set(OURS)
    assert [suite.name for suite in load_suites(["glue"])] == yaml.safe_load((BUILT_IN / "glue.yaml").read_text())[
        "suites"
    ]


@pytest.mark.parametrize("name", OURS)
def test_a_preset_reads_local_files_by_its_own_fields(name: str, tmp_path: Path) -> None:
    suite = load_suites([name], overrides=[(None, "local_dir", str(tmp_path))])[0]
    settings = suite.settings
    assert isinstance(settings, ClassifySettings)
    assert (settings.local_name, bool(suite.description)) == (name, True)
    for source in (settings.train, settings.test, settings.dev):
        if source:
            parts = labelled._ID.fullmatch(source.removeprefix("hub:").rpartition(":")[0])
            assert parts is not None
            assert "/" in parts["name"]
    record = {name: f"text of {name}" for name in (settings.text_field, settings.text_b_field) if name}
    both = [record | {settings.label_field: label} for label in (0, 1, 0, 1)]
    for part in ("train", "test"):
        write(tmp_path / name / f"{part}.jsonl", both)
    data = ClassifyData.read(sources(settings))
    assert data.classes == ["0", "1"]
    assert (data.train.seconds is None) == (settings.text_b_field is None)
    assert data.positive(settings.positive_label) == (1 if name in ("mrpc", "qqp") else None)
