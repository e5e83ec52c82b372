"""Readers of the datasets of text, byte by byte: LRA text (IMDb) and retrieval (pairs of the ACL Anthology Network)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.sources.format import suffixes, supported
from data_pipeline.sources.reading import Quotes
from eval.shared.labelled import read_folders, read_labelled
from eval.tasks.lra.examples import Split

BYTES = 256
# LRA's input pipeline reads no more of a document than this, before it cuts it to the maximal length.
RETRIEVAL_BYTES = 10_000
_NAMES = {"train": ("train",), "dev": ("dev", "valid", "validation", "val", "eval"), "test": ("test",)}
_SIDES = ("neg", "pos")

Texts = tuple[list[str], list[str]]


def as_bytes(text: str, length: int) -> np.ndarray:
    """The first ``length`` bytes of the UTF-8 text, uint8."""
    return np.frombuffer(text.encode()[:length], dtype=np.uint8)


def read_texts(
    folder: Path, text_field: str, label_field: str, max_length: int, quotes: Quotes = "auto"
) -> tuple[dict[str, Split], list[str]]:
    """Splits train, test and (where there is one) dev, and the classes.

    ``folder`` holds train.*, test.* and perhaps dev.* (JSONL, CSV, TSV, Parquet), or the folders train and test of
    IMDb's own release, with pos and neg in each. Raises :class:`UserError` for what is missing or cannot be read.
    """
    texts: dict[str, Texts] = {}
    for name, stems in _NAMES.items():
        found = _find(folder, stems)
        if found is not None:
            labelled = read_labelled(found, text_field, label_field, quotes=quotes)
            texts[name] = (labelled.texts, labelled.labels)
        elif (folder / name / _SIDES[0]).is_dir() and (folder / name / _SIDES[1]).is_dir():
            texts[name] = _read_sides(folder / name)
        elif name != "dev":
            raise UserError(
                f"{folder} has no {name} split: {name} with {supported(with_fields=True)}, or the folders {name}/pos "
                f"and {name}/neg of the IMDb release, are expected"
            )
    classes = sorted(set(texts["train"][1]))
    index = {name: number for number, name in enumerate(classes)}
    splits: dict[str, Split] = {}
    for name, (documents, labels) in texts.items():
        unseen = sorted(set(labels) - set(classes))
        if unseen:
            raise UserError(f"{folder}: {name} has the label '{unseen[0]}', which train lacks ({', '.join(classes)})")
        # An empty text becomes one blank: there is nothing to attend to in none.
        columns = ([as_bytes(document or " ", max_length) for document in documents],)
        splits[name] = Split(columns, np.array([index[label] for label in labels], dtype=np.int64))
    return splits, classes


def _find(folder: Path, stems: tuple[str, ...]) -> Path | None:
    endings = suffixes(with_fields=True)
    found = [path for stem in stems for ending in endings if (path := folder / f"{stem}{ending}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: {found[0].name} and {found[1].name} are both there: which one is meant?")
    return found[0] if found else None


def _read_sides(folder: Path) -> Texts:
    sides = [(text, label) for text, label, _ in read_folders(folder) if label in _SIDES]
    if not sides:
        raise UserError(f"{folder}: no .txt file in {' or '.join(_SIDES)}")
    return [text for text, _ in sides], [label for _, label in sides]


def read_pairs(folder: Path, max_length: int, limits: dict[str, int | None]) -> dict[str, Split]:
    """Splits of LRA's retrieval release, ``*.train.tsv``, ``*.eval.tsv`` and ``*.test.tsv``.

    A line is label, id, id, text, text with tabs between, without header or quotes. Raises :class:`UserError` naming
    file and line for anything else.
    """
    splits: dict[str, Split] = {}
    for name, stems in _NAMES.items():
        found = sorted(
            {path for stem in stems for path in (*folder.glob(f"*.{stem}.tsv"), *folder.glob(f"{stem}.tsv"))}
        )
        if len(found) != 1:
            what = f"{found[0].name} and {found[1].name}" if found else "none"
            raise UserError(
                f"{folder}: one file *.{stems[-1]}.tsv of the retrieval release is expected for the {name} split, "
                f"found {what}"
            )
        first: list[np.ndarray] = []
        second: list[np.ndarray] = []
        labels: list[int] = []
        for label, one, other in _pairs(found[0]):
            if limits[name] is not None and len(labels) == limits[name]:
                break
            labels.append(label)
            first.append(one[:max_length])
            second.append(other[:max_length])
        splits[name] = Split((first, second), np.array(labels, dtype=np.int64))
    return splits


def _pairs(path: Path) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                fields = line.rstrip(b"\r\n").split(b"\t")
                if len(fields) != 5:
                    raise UserError(
                        f"{path}, line {number}: {len(fields)} fields where label, id, id, text, text are expected, "
                        "separated by tabs"
                    )
                try:
                    label = float(fields[0])
                except ValueError:
                    label = -1.0
                if label not in (0.0, 1.0):
                    raise UserError(f"{path}, line {number}: the label {fields[0][:20]!r} is neither 0 nor 1")
                # An empty document becomes one blank: there is nothing to attend to in none.
                one, other = (np.frombuffer(text[:RETRIEVAL_BYTES] or b" ", dtype=np.uint8) for text in fields[3:])
                yield int(label), one, other
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
