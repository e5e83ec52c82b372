"""Reading labelled text, and the split that is carved from it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.errors import UserError
from eval.shared.labelled import Labelled, read_labelled
from eval.shared.training import carve
from eval.tasks.classification.dataset import class_names

TEXTS = ['a, "quoted"\nline', "b\tüber", "c" * 200_000]  # the last is longer than csv's own limit for a field
LABELS = ["pos", "neg", "pos"]


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}


def write(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    records = [{"text": t, "label": y} for t, y in zip(TEXTS, LABELS, strict=True)]
    kind, _, codec = kind.partition(".")
    out = io.StringIO(newline="")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    if kind == "jsonl":
        out.write("".join(json.dumps(r) + "\n" for r in records) + "\n")
    else:
        writer = csv.DictWriter(out, ["label", "text"], delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    path.write_bytes(PACKERS[codec](out.getvalue().encode()))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "csv.zst", "tsv", "tsv.gz", "parquet"])
def test_every_format_reads_the_same(tmp_path: Path, kind: str) -> None:
    data = read_labelled(write(tmp_path, kind), quotes="csv")  # the writer of TSV here quotes as that of CSV
    assert data.texts == TEXTS
    assert data.labels == LABELS
    assert data.hash == read_labelled(write(tmp_path, "jsonl")).hash


def test_integer_labels_sort_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": "t", "label": i}) + "\n" for i in (10, 9, 2, 10)))
    data = read_labelled(path)
    assert class_names(data, data) == ["2", "9", "10"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            '{"body": "x", "label": 1}',
            "no field 'text'; its fields are: body, label (choose with --text-field)",
        ),
        ("a.jsonl", '{"text": "x", "sentiment": 1}', "--label-field"),
        ("a.jsonl", '{"text": 3, "label": 1}', "line 1: field 'text' is int"),
        ("a.jsonl", '{"text": "x", "label": [1]}', "not a label"),
        ("a.jsonl", '{"text": "x", "label": 0.5}', "not a label"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{oops', "line 2: not a JSON record"),
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n{"text": "so good \\ud83d", "label": 1}',
            "line 2: field 'text' holds half",
        ),
        (
            "a.jsonl",
            '{"text": "x", "label": "\\udc00"}',
            "line 1: field 'label' holds half a surrogate pair (character 1)",
        ),
        ("a.jsonl", "[1]", "a record must be a JSON object with fields, one on each line, not list"),
        ("a.jsonl", "", "holds no record"),
        ("a.csv", "text,label\n", "holds no record"),
        ("a.csv", "txt,label\nx,1\n", "no column 'text'; its columns are: txt, label (choose with --text-field)"),
        ("a.csv", "text,y\nx,1\n", "no column 'label'; its columns are: text, y (choose with --label-field)"),
        ("a.parquet", "not parquet", "cannot be read"),
        ("a.jsonl.gz", "not gzip", "the gzip compression is damaged or cut short"),
        ("a.xlsx", "x", "files of this kind are not read; supported are .csv, "),
    ],
)
def test_rejections_name_file_and_place(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_labelled(path)
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_missing_file_and_bad_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_labelled(tmp_path / "none.jsonl")
    (tmp_path / "latin.csv").write_bytes("text,label\nf\xfcr,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_labelled(tmp_path / "latin.csv")


def test_damaged_gzip(tmp_path: Path) -> None:
    record = json.dumps({"text": "x", "label": 1}).encode() + b"\n"
    packer = zlib.compressobj(wbits=31)
    sound = packer.compress(record) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(record) + packer.flush()
    path = tmp_path / "damaged.jsonl.gz"
    path.write_bytes(sound + rest)
    assert len(read_labelled(path)) == 2
    damaged = sound + b"\xff" + rest[1:]  # no kind of block
    with pytest.raises(zlib.error):
        gzip.decompress(damaged)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged\.jsonl\.gz: the gzip compression is damaged .*invalid block type"):
        read_labelled(path)


def labelled(labels: list[str]) -> Labelled:
    return Labelled(["t"] * len(labels), labels, "file", "hash")


def test_labels_must_fit() -> None:
    with pytest.raises(UserError, match=r"'c' \(2x\)"):
        class_names(labelled(["a", "b"]), labelled(["a", "c", "c"]))
    with pytest.raises(UserError, match="one label only"):
        class_names(labelled(["a", "a"]), labelled(["a"]))
    with pytest.raises(UserError, match="right one"):
        class_names(labelled([str(i) for i in range(1500)]), labelled(["1"]))


def test_carved_split_is_by_class_and_leaves_every_class_in_training() -> None:
    labels = np.repeat([0, 1, 2, 3], [60, 20, 2, 1])
    rest, held = carve(labels, 0.15, seed=0)
    assert sorted([*rest, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=4).tolist() == [9, 3, 1, 0]
    again = carve(labels, 0.15, seed=0)
    assert np.array_equal(again[1], held)
    assert not np.array_equal(carve(labels, 0.15, seed=1)[1], held)
    with pytest.raises(UserError, match="none can be held out"):
        carve(np.array([0, 1, 2]), 0.15, seed=0)


def test_a_folder_for_each_label(tmp_path: Path) -> None:
    """As the IMDb release lies: train/pos/1_8.txt, and train/unsup without labels."""
    for name, text in [("pos/2_8", "fine\r\nfilm"), ("pos/10_9", "gréat"), ("neg/1_1", "dull"), ("unsup/0_0", "?")]:
        path = tmp_path / "train" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "train" / "urls_pos.txt").write_text("no review")
    (tmp_path / "train" / "pos" / "notes.md").write_text("no review")
    data = read_labelled(tmp_path / "train")
    assert (data.texts, data.labels) == (["dull", "gréat", "fine\nfilm"], ["neg", "pos", "pos"])
    (tmp_path / "same.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in zip(data.texts, data.labels, strict=True))
    )
    assert read_labelled(tmp_path / "same.jsonl").hash == data.hash
    with pytest.raises(UserError, match=r"train/unsup is a folder without LABEL/\*.txt"):
        read_labelled(tmp_path / "train" / "unsup")
    with pytest.raises(UserError, match="is a folder, a file is expected"):
        read_labelled(tmp_path / "train", scores=True)
    (tmp_path / "train" / "neg" / "1_1.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"neg/1_1.txt cannot be read: .*utf-8"):
        read_labelled(tmp_path / "train")
