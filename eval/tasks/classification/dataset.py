"""The parts of a classification task: which files they are, their classes, and a draw of some records."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.sources.format import suffixes, supported
from eval.shared.labelled import HUB, Labelled, pinned, read_labelled
from eval.tasks.classification import ClassifySettings, FineTuneSettings

AnyFineTune = TypeVar("AnyFineTune", bound=FineTuneSettings)


@dataclass(frozen=True)
class ClassifyData:
    """Training and test records, those that choose the epoch (None: carved from training), and the classes."""

    train: Labelled
    test: Labelled
    classes: list[str]
    dev: Labelled | None = None

    @classmethod
    def read(cls, settings: ClassifySettings) -> ClassifyData:
        """Read what the (resolved) settings name; raises :class:`UserError` for what is missing or does not fit."""
        assert settings.train
        assert settings.test
        fields = settings.text_field, settings.label_field, settings.text_b_field, settings.quotes
        train = read_labelled(settings.train, *fields)
        test = read_labelled(settings.test, *fields)
        dev = read_labelled(settings.dev, *fields) if settings.dev else None
        classes = class_names(train, test)
        if dev is not None:
            class_names(train, dev)
        if settings.train_records is not None and settings.train_records < len(train):
            # Of a class with a single record none is held out to choose the epoch on: two of each, where that is done.
            train = train.take(draw(train, classes, settings.train_records, least=2 if dev is None else 1))
        return cls(train, test, classes, dev)

    def with_train(self, train: Labelled) -> ClassifyData:
        """The same with other training records."""
        return replace(self, train=train)

    def describe(self) -> dict[str, Any]:
        """What the result says about the data."""
        hashes = [self.train.hash, self.test.hash, *([self.dev.hash] if self.dev else [])]
        return {
            "train": self.train.path,
            "test": self.test.path,
            **({"dev": self.dev.path, "dev_records": len(self.dev)} if self.dev else {}),
            "train_records": len(self.train),
            "test_records": len(self.test),
            "classes": self.classes,
            "hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        }

    def seen(self) -> np.ndarray:
        """(n,) bool: which test records have a text that training, or the choice of the epoch, has seen too.

        Compared in small letters with white space as one space; of pairs both texts must be the same. Labels are not
        looked at: a text with another label there is no less known.
        """
        return stands_in(self.test, self.train, self.dev)

    @property
    def outputs(self) -> int:
        """Of the head: one for each class."""
        return len(self.classes)

    def numbers(self, part: Labelled) -> np.ndarray:
        """Class numbers (n,) int64."""
        index = {name: i for i, name in enumerate(self.classes)}
        return np.array([index[label] for label in part.labels], dtype=np.int64)

    def positive(self, names: tuple[str, ...]) -> int | None:
        """Number of the first of ``names`` that is a class; None without names.

        Raises :class:`UserError` if none of them is one.
        """
        if not names:
            return None
        for name in names:
            if name in self.classes:
                return self.classes.index(name)
        raise UserError(
            f"--positive-label {' '.join(names)}: {self.train.path} has no such class, it has {', '.join(self.classes)}"
        )


def stands_in(test: Labelled, *others: Labelled | None) -> np.ndarray:
    """(n,) bool: which records of ``test`` have a text that one of the others has; see :meth:`ClassifyData.seen`."""
    known = {key for part in others if part is not None for key in _contents(part)}
    return np.array([key in known for key in _contents(test)], dtype=bool)


def _contents(part: Labelled) -> list[tuple[str, ...]]:
    columns = [texts for texts in (part.texts, part.seconds) if texts is not None]
    return list(zip(*([" ".join(text.casefold().split()) for text in texts] for texts in columns), strict=True))


def overlap_warning(seen: np.ndarray, settings: FineTuneSettings, figure: str = "accuracy") -> str:
    """What is to be said of test texts that were trained on, "" where there are none. ``seen``: (n,) bool."""
    if not seen.any():
        return ""
    where = settings.train if not settings.dev else f"{settings.train} or {settings.dev}"
    return (
        f"{int(seen.sum()):,} of {len(seen):,} test texts ({seen.mean():.1%}) stand in {where} too: {figure} on texts "
        "that were trained on says little. Take them out of one of the two."
    )


def sources(settings: AnyFineTune) -> AnyFineTune:
    """Settings with the files of ``local_dir`` and pinned hub datasets in place.

    Raises :class:`UserError` where no data is named, files are not there, or files and ``local_dir`` are named both.
    """
    if settings.local_dir is not None:
        folder = Path(settings.local_dir, settings.local_name or "")
        found = {part: _find(folder, part) for part in ("train", "test", "dev")}
        for part in ("train", "test"):
            if found[part] is None:
                raise UserError(
                    f"--local-dir {settings.local_dir}: there is no {folder / part} with "
                    f"{supported(with_fields=True)}, and no folder {part} with a folder of .txt files for each label"
                )
        for part, path in found.items():
            named_too = getattr(settings, part)
            if named_too and not named_too.startswith(HUB) and named_too != path:
                raise UserError(
                    f"--local-dir {settings.local_dir} is in place of a suite's hub data, but --{part} names the file "
                    f"{named_too}: leave one out (--local-dir reads {folder / part}.* itself)"
                )
        return settings.model_copy(update=found)
    if not (settings.train and settings.test):
        raise UserError(
            "no labelled text is named: --train FILE --test FILE (JSONL, CSV, TSV or Parquet), or --local-dir DIR"
        )
    named = {part: getattr(settings, part) for part in ("train", "test", "dev")}
    if not named["train"].startswith(HUB) and (named["dev"] or "").startswith(HUB):
        named["dev"] = None  # of the suite, whose training text a file has replaced
    return settings.model_copy(update={part: pinned(source) for part, source in named.items()})


def _find(folder: Path, part: str) -> str | None:
    names = (folder / (part + suffix) for suffix in suffixes(with_fields=True))
    found = [str(path) for path in names if path.is_file()] or [str(folder / part)] * (folder / part).is_dir()
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} are both there: keep one")
    return found[0] if found else None


def class_names(train: Labelled, other: Labelled) -> list[str]:
    """The labels of ``train``, sorted; raises :class:`UserError` for fewer than two or a label of ``other`` unseen
    there."""
    names = sorted(set(train.labels), key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    if len(names) < 2:
        raise UserError(f"{train.path} has one label only, '{names[0]}': nothing to classify")
    if len(names) > max(1000, len(train) // 2):
        raise UserError(
            f"{train.path} has {len(names)} labels on {len(train)} records: is --label-field the right one?"
        )
    unseen = Counter(label for label in other.labels if label not in set(names))
    if unseen:
        shown = ", ".join(f"'{label}' ({n}x)" for label, n in unseen.most_common(5))
        raise UserError(f"{other.path} has labels that {train.path} lacks: {shown}; train has {', '.join(names[:10])}")
    return names


def draw(train: Labelled, classes: list[str], records: int, least: int) -> np.ndarray:
    """Indices (``records``,) of a random draw by class: each in its share, but ``least`` of each or all there are.

    Raises :class:`UserError` where that is more than ``records``.
    """
    index = {name: i for i, name in enumerate(classes)}
    numbers = np.array([index[label] for label in train.labels])
    members = [np.flatnonzero(numbers == number) for number in range(len(classes))]
    there = np.array([len(found) for found in members])
    floor = np.minimum(there, least)
    if floor.sum() > records:
        raise UserError(
            f"--train-records {records} is too few for the {len(classes)} labels of {train.path}: at least "
            f"{floor.sum()}, so that there are {least} of each" + (", one to choose the epoch on" if least > 1 else "")
        )
    share = records * there / there.sum()
    given = np.maximum(np.floor(share).astype(np.int64), floor)
    while given.sum() < records:
        given[np.argmax(np.where(given < there, share - given, -np.inf))] += 1
    while given.sum() > records:
        given[np.argmax(np.where(given > floor, given - share, -np.inf))] -= 1
    rng = np.random.default_rng(0)
    drawn = [rng.choice(found, count, replace=False) for found, count in zip(members, given, strict=True)]
    return np.sort(np.concatenate(drawn))


def nested_order(numbers: np.ndarray, seed: int, least: int = 2) -> np.ndarray:
    """The indices of records of the classes ``numbers`` (n,), drawn in an order of which every beginning has each class
    in its share, and at first ``least`` of each. So a smaller draw is part of a larger one."""
    rng = np.random.default_rng(seed)
    keys: list[tuple[bool, float, int, int]] = []
    for number in np.unique(numbers).tolist():
        members = rng.permutation(np.flatnonzero(numbers == number)).tolist()
        keys += [(j >= least, (j + 0.5) / len(members), number, index) for j, index in enumerate(members)]
    return np.array([index for *_, index in sorted(keys)], dtype=np.int64)
