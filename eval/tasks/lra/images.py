"""Readers of the datasets of pixels: LRA image (CIFAR-10, grey) and Pathfinder, a sequence of 1024 levels each."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from eval.tasks.lra.examples import Split

LEVELS = 256
SIDE = 32
PIXELS = SIDE * SIDE
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PATHFINDER_CLASSES = ["not connected", "connected"]
_CIFAR_RECORD = 1 + 3 * PIXELS
# Y of Rec. 601 as TensorFlow's rgb_to_grayscale has it, which LRA uses.
_GREY = np.array([0.2989, 0.5870, 0.1140], dtype=np.float32)

Images = tuple[np.ndarray, np.ndarray]


def grey(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> (...) uint8, as ``tf.image.rgb_to_grayscale`` rounds: the level in [0, 1] times 255.5, cut."""
    return ((rgb.astype(np.float32) / 255) @ _GREY * 255.5).astype(np.uint8)


def read_cifar(path: Path) -> dict[str, Split]:
    """Splits train and test from the binary version of CIFAR-10 or an .npz file; see :func:`read_npz`."""
    if path.is_file():
        return read_npz(path, len(CIFAR_CLASSES))
    folder = path / "cifar-10-batches-bin" if (path / "cifar-10-batches-bin").is_dir() else path
    train = sorted(folder.glob("data_batch_*.bin"))
    test = folder / "test_batch.bin"
    if not train or not test.is_file():
        hint = ""
        if (path / "data_batch_1").is_file() or (path / "cifar-10-batches-py").is_dir():
            hint = "; the Python version is pickled, and reading a pickle runs whatever it holds: it is not read"
        raise UserError(
            f"{path}: data_batch_*.bin and test_batch.bin of CIFAR-10's binary version, or an .npz file, are "
            f"expected{hint}"
        )
    parts = [_read_batch(batch) for batch in train]
    joined = (np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts]))
    return {"train": _split(joined), "test": _split(_read_batch(test))}


def _read_batch(path: Path) -> Images:
    raw = np.fromfile(path, dtype=np.uint8)
    if not len(raw) or len(raw) % _CIFAR_RECORD:
        raise UserError(f"{path}: {len(raw)} bytes are no whole number of CIFAR-10 records of {_CIFAR_RECORD} bytes")
    records = raw.reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CIFAR_CLASSES):
        raise UserError(f"{path}: label {labels.max()}, but CIFAR-10 has ten classes; is it CIFAR-100?")
    return grey(records[:, 1:].reshape(-1, 3, PIXELS).transpose(0, 2, 1)), labels


def read_pathfinder(path: Path) -> dict[str, Split]:
    """One split ``train`` of all images of a difficulty, or those of an .npz file; see :func:`read_npz`.

    ``path`` is a folder of the LRA release, as pathfinder32/curv_contour_length_14: folders ``metadata`` (a line an
    image: folder, file, number, label, ...) and ``imgs``. Images that are empty files, of which the release has some,
    are left out, as LRA does. Raises :class:`UserError` naming the file for anything else.
    """
    from PIL import Image, UnidentifiedImageError

    if path.is_file():
        return read_npz(path, len(PATHFINDER_CLASSES))
    # Text in spite of the ending: they were written with savetxt.
    listings = sorted((path / "metadata").glob("*.npy"), key=lambda file: (len(file.name), file.name))
    if not listings:
        raise UserError(
            f"{path}: no metadata/*.npy: name a folder of the release such as pathfinder32/curv_contour_length_14, or "
            "an .npz file"
        )
    images: list[np.ndarray] = []
    labels: list[int] = []
    for listing in listings:
        try:
            lines = listing.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{listing} is not a listing of the Pathfinder release: {error}") from None
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise UserError(f"{listing}, line {number}: folder, file, number and label (0 or 1) are expected")
            file = path / fields[0] / fields[1]
            try:
                if not file.stat().st_size:
                    continue
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("L"))
            except (OSError, UnidentifiedImageError) as error:
                raise UserError(f"{listing}, line {number}: {file} cannot be read: {error}") from None
            if pixels.shape != (SIDE, SIDE):
                raise UserError(f"{file} is {pixels.shape[1]} x {pixels.shape[0]}, not {SIDE} x {SIDE}")
            images.append(pixels.reshape(-1))
            labels.append(int(fields[3]))
    if not images:
        raise UserError(f"{path}: the listings in metadata name no image that is there")
    return {"train": Split((images,), np.array(labels, dtype=np.int64))}


def read_npz(path: Path, classes: int) -> dict[str, Split]:
    """Splits from arrays ``x_train``, ``y_train`` and likewise test and dev, of which only train must be there.

    ``x``: (n, 32, 32) grey, (n, 32, 32, 3) colour or (n, 1024), uint8; ``y``: (n,) or (n, 1) whole numbers. Raises
    :class:`UserError` for anything else, also for arrays of objects, which are pickled.
    """
    splits: dict[str, Split] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in ("train", "dev", "test"):
                if f"x_{name}" in file:
                    splits[name] = _split(_arrays(path, name, file[f"x_{name}"], file[f"y_{name}"], classes))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an .npz file of images: {error}") from None
    if "train" not in splits:
        raise UserError(f"{path}: no arrays x_train and y_train")
    return splits


def _arrays(path: Path, name: str, x: np.ndarray, y: np.ndarray, classes: int) -> Images:
    if x.dtype != np.uint8 or x.shape[1:] not in ((SIDE, SIDE), (SIDE, SIDE, 3), (PIXELS,)):
        raise UserError(
            f"{path}: x_{name} is {x.dtype} of shape {x.shape}; uint8 of (n, 32, 32), (n, 32, 32, 3) or (n, 1024) is "
            "expected"
        )
    labels = y.reshape(-1)
    if labels.shape != (len(x),) or labels.dtype.kind not in "ui":
        raise UserError(f"{path}: y_{name} is {y.dtype} of shape {y.shape}; {len(x)} whole numbers are expected")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"{path}: labels of {name} from {labels.min()} to {labels.max()}; 0 to {classes - 1} expected")
    return (grey(x) if x.ndim == 4 else x), labels.astype(np.int64)


def _split(images: Images) -> Split:
    pixels, labels = images
    return Split((list(pixels.reshape(len(pixels), -1)),), labels)
