"""Readers of Long Range Arena's files, on tiny ones written here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from eval.tasks.lra import LRASettings, images, texts
from eval.tasks.lra.data import load
from eval.tasks.lra.task import resolve


def of(**settings: object) -> LRASettings:
    return resolve(None, LRASettings.model_validate(settings))


def reject(message: str, **settings: object) -> None:
    with pytest.raises(UserError, match=message):
        load(of(**settings))


def test_text_from_files_and_from_the_imdb_folders(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"film {i} ä,{i % 2}\n" for i in range(20)))
    (tmp_path / "test.jsonl").write_text('{"text": "fine", "label": 1}\n{"text": "", "label": 0}\n')
    data = load(of(benchmark="text", path=str(tmp_path), max_length=8, dev_share=0.2))
    assert [len(split) for split in data.splits().values()] == [16, 4, 2]
    assert data.test.columns[0][0].tobytes() == b"fine"
    assert data.test.columns[0][1].tobytes() == b" "
    assert data.test.labels.tolist() == [1, 0]
    seen = sorted(row.tobytes() for split in (data.train, data.dev) for row in split.columns[0])
    assert seen == sorted(f"film {i} ä".encode()[:8] for i in range(20))
    assert (np.bincount(data.dev.labels) == 2).all()  # carved by class
    assert data.vocabulary == 256

    release = tmp_path / "aclImdb"
    for split in ("train", "test"):
        for side in ("neg", "pos"):
            folder = release / split / side
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{number}_7.txt").write_text(f"{split} {side} {number}")
    data = load(of(benchmark="text", path=str(release)))
    assert data.classes == ["neg", "pos"]
    assert data.test.columns[0][4].tobytes() == b"test pos 0"
    assert data.test.labels.tolist() == [0] * 4 + [1] * 4
    (tmp_path / "train.tsv").write_text("text\tlabel\n")
    reject("train.csv and train.tsv are both there", benchmark="text", path=str(tmp_path))
    (tmp_path / "train.tsv").unlink()
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": 2}\n')
    reject("test has the label '2', which train lacks", benchmark="text", path=str(tmp_path))
    (tmp_path / "test.jsonl").unlink()
    reject("has no test split", benchmark="text", path=str(tmp_path))


def test_retrieval(tmp_path: Path) -> None:
    for name, count in (("train", 6), ("eval", 3), ("test", 2)):
        lines = [f'{i % 2}.0\tA{i}\tB{i}\tfirst "{i}\tsecond ä{i}\n' for i in range(count)]
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text("".join(lines), encoding="utf-8")
    settings = {"benchmark": "retrieval", "path": str(tmp_path), "max_length": 9}
    data = load(of(**settings))
    assert [len(split) for split in data.splits().values()] == [6, 3, 2]
    one, other = (column[1].tobytes() for column in data.train.columns)
    assert (one, other) == (b'first "1', "second ä1".encode()[:9])
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert len(load(of(**settings, train_size=2)).train) == 2
    path = tmp_path / "new_aan_pairs.test.tsv"
    for text, message in (("0\ta\tb\tc\n", "line 1: 4 fields"), ("2\ta\tb\tc\td\n", "line 1: the label b'2'")):
        path.write_text(text)
        reject(message, **settings)
    path.unlink()
    reject(r"one file \*.test.tsv of the retrieval release .* found none", **settings)


def test_cifar_binary(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (44, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(44, dtype=np.uint8) % 10
    records = np.concatenate([labels[:, None], colours.reshape(44, -1)], axis=1)
    for name, rows in (("data_batch_1", slice(0, 20)), ("data_batch_2", slice(20, 40)), ("test_batch", slice(40, 44))):
        records[rows].tofile(tmp_path / f"{name}.bin")
    data = load(of(benchmark="image", path=str(tmp_path), dev_share=0.25))
    assert [len(split) for split in data.splits().values()] == [30, 10, 4]
    weights = (0.2989, 0.5870, 0.1140)
    for row, label, source in zip(data.test.columns[0], data.test.labels, colours[40:], strict=True):
        level = sum(w * c.astype(np.float64) for w, c in zip(weights, source, strict=True)) / 255 * 255.5
        assert row.shape == (1024,)
        assert np.abs(row.reshape(32, 32) - np.floor(level)).max() <= 1  # float32 at a whole number
        assert (row.reshape(32, 32) == np.floor(level)).mean() > 0.99
        assert label in (0, 1, 2, 3)
    reject("would cut images of 1024 pixels", benchmark="image", path=str(tmp_path), max_length=100)
    (tmp_path / "data_batch_1.bin").write_bytes(b"abc")
    reject("3 bytes are no whole number of CIFAR-10 records", benchmark="image", path=str(tmp_path))
    (tmp_path / "py").mkdir()
    (tmp_path / "py" / "data_batch_1").write_bytes(b"\x80\x04")
    reject("it is not read", benchmark="image", path=str(tmp_path / "py"))
    records[:, 0] = 99
    records[:3].tofile(tmp_path / "data_batch_1.bin")
    reject("is it CIFAR-100", benchmark="image", path=str(tmp_path))


def test_white_and_black_stay() -> None:
    assert images.grey(np.array([[255, 255, 255], [0, 0, 0]], dtype=np.uint8)).tolist() == [255, 0]


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "small.npz"
    x = np.arange(10 * 1024, dtype=np.uint32).astype(np.uint8).reshape(10, 32, 32)
    y = np.arange(10) % 2
    np.savez(path, x_train=x, y_train=y[:, None], x_test=x[:2], y_test=y[:2])
    data = load(of(benchmark="image", path=str(path), dev_share=0.4))
    assert [len(split) for split in data.splits().values()] == [6, 4, 2]
    assert data.test.columns[0][1].tolist() == x[1].reshape(-1).tolist()
    np.savez(path, x_train=np.repeat(x, 20, 0), y_train=np.repeat(y, 20))
    pathfinder = load(of(benchmark="pathfinder", path=str(path)))
    assert [len(split) for split in pathfinder.splits().values()] == [160, 20, 20]  # LRA's shares
    np.savez(path, x_train=x.astype(np.float32), y_train=y)
    reject("x_train is float32 of shape", benchmark="image", path=str(path))
    np.savez(path, x_train=x, y_train=y[:3])
    reject("10 whole numbers are expected", benchmark="image", path=str(path))
    np.savez(path, x_train=x, y_train=y + 9)
    reject("labels of train from 9 to 10", benchmark="image", path=str(path))
    np.savez(path, x_train=np.array([{"a": 1}], dtype=object), y_train=y)
    reject("cannot be read as an .npz file", benchmark="image", path=str(path))
    np.savez(path, other=x)
    reject("no arrays x_train and y_train", benchmark="pathfinder", path=str(path))


def test_pathfinder_release(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    lines = []
    for number in range(20):
        folder = tmp_path / "imgs" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((32, 32), number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"sample_{number}.png")
        lines.append(f"imgs/{number % 2} sample_{number}.png {number} {number // 2 % 2} 1.8 14 3 2\n")
    (tmp_path / "imgs" / "0" / "sample_0.png").write_bytes(b"")  # as in the release
    (tmp_path / "metadata" / "0.npy").write_text("".join(lines))
    settings = {"benchmark": "pathfinder", "path": str(tmp_path)}
    data = load(of(**settings))
    assert [len(split) for split in data.splits().values()] == [15, 2, 2]
    found = {int(row[0]): int(label) for split in data.splits().values()
             for row, label in zip(split.columns[0], split.labels, strict=True)}  # fmt: skip
    assert found == {number: number // 2 % 2 for number in range(1, 20)}
    (tmp_path / "metadata" / "0.npy").write_text("imgs/0 sample_2.png 2\n")
    reject("line 1: folder, file, number and label", **settings)
    (tmp_path / "metadata" / "0.npy").write_text("imgs/0 gone.png 2 1\n")
    reject("line 1: .*gone.png cannot be read", **settings)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "imgs" / "0" / "sample_2.png")
    (tmp_path / "metadata" / "0.npy").write_text("imgs/0 sample_2.png 2 1\n")
    reject("is 8 x 8, not 32 x 32", **settings)
    (tmp_path / "metadata" / "0.npy").unlink()
    reject("no metadata", **settings)


def test_listops_files_and_what_is_missing(tmp_path: Path) -> None:
    reject("--path .*nowhere does not exist", path=str(tmp_path / "nowhere"))
    reject("give --path, the folder with train", benchmark="text")
    for name, rows in (("train", 3), ("val", 2), ("test", 1)):
        body = "".join(f"( ( ( [SM {i} ) 2 ) ] )\t{i + 2}\n" for i in range(rows))
        (tmp_path / f"basic_{name}.tsv").write_text("Source\tTarget\n" + body)
    data = load(of(path=str(tmp_path)))
    assert [len(split) for split in data.splits().values()] == [3, 2, 1]
    assert data.train.labels.tolist() == [2, 3, 4]
    reject(r"basic_train.tsv: an expression has 4 symbols, .* --max-length 4 or more", path=str(tmp_path), max_length=3)
    assert load(of(path=str(tmp_path), max_length=4)).test.lengths.tolist() == [4]
    (tmp_path / "other_val.tsv").write_text("")
    reject(r"2 files \*_val.tsv", path=str(tmp_path))
    (tmp_path / "other_val.tsv").unlink()
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n[SM 1 2 ]\t3\n")
    reject("all training examples of listops have one label", path=str(tmp_path))
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n")
    reject("no train example", path=str(tmp_path))


def test_bytes_are_cut_after_encoding() -> None:
    assert texts.as_bytes("aä", 2).tolist() == [97, 0xC3]
