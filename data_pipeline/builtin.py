"""A corpus that every machine has: the Python standard library's own source and documentation, collected without a
download.

It gives text to pretrain on and a classification task, *which top-level package is this module from*, whose test
modules are all in the held-out part and thus were not pretrained on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic

VALID_SHARE = 0.10
LABELLED_VALID_SHARE = (
    0.30  # of the packages of the classification task, so that its test set is large enough to tell scores apart
)
LABEL_MODULES = 20  # a package with fewer modules is not a class
SMALLEST = 200  # characters; below are empty or nearly empty __init__.py files

_SKIPPED_FOLDERS = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "test",
    "tests",
    "idle_test",
    "_bundled",
}
_TOPICS = "pydoc_data/topics.py"  # its entries are taken one by one


class SourceDocument(NamedTuple):
    """A module's source or an entry of the language reference."""

    name: str  # such as "asyncio/base_events.py" or "topics/assert"
    text: str

    @property
    def package(self) -> str | None:
        """The top-level package of a module inside one."""
        head, slash, _ = self.name.partition("/")
        return head if slash and self.name.endswith(".py") else None


@dataclass(frozen=True)
class StdlibCorpus:
    """What was written: paths, documents and bytes by file name, and the classes with their numbers of modules."""

    folder: Path
    documents: dict[str, int]
    bytes: dict[str, int]
    labels: dict[str, int]
    changed: bool


def write_stdlib_corpus(folder: str | Path) -> StdlibCorpus:
    """Write ``train.jsonl`` and ``valid.jsonl`` (fields text, source), ``classify-train.jsonl`` and
    ``classify-test.jsonl`` (text, label, source) to ``folder``.

    The division is by a hash of the documents' names: the same Python gives the same bytes. Files that are there
    already with those bytes stay untouched. Raises :class:`UserError` where this Python has no source files.
    """
    folder = Path(folder)
    documents = list(collect_stdlib())
    if len(documents) < 100:
        raise UserError(
            f"this Python has only {len(documents)} documents in {_stdlib_folder()}: its standard library comes "
            "without source; use another Python or your own text"
        )
    packages = Counter(d.package for d in documents if d.package is not None)
    labels = {name: count for name, count in sorted(packages.items()) if count >= LABEL_MODULES}
    held_out = _held_out(documents, set(labels))

    files: dict[str, list[dict[str, str]]] = {
        name: [] for name in ("train.jsonl", "valid.jsonl", "classify-train.jsonl", "classify-test.jsonl")
    }
    for document in documents:
        valid = document.name in held_out
        record = {"text": document.text, "source": document.name}
        files["valid.jsonl" if valid else "train.jsonl"].append(record)
        if document.package in labels:
            files["classify-test.jsonl" if valid else "classify-train.jsonl"].append(
                {**record, "label": document.package}
            )

    try:
        folder.mkdir(parents=True, exist_ok=True)
        changed = False
        sizes = {}
        for name, records in files.items():
            data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
            sizes[name] = len(data)
            path = folder / name
            if not path.is_file() or path.read_bytes() != data:
                write_atomic(path, data)
                changed = True
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    return StdlibCorpus(folder, {name: len(records) for name, records in files.items()}, sizes, labels, changed)


def collect_stdlib() -> Iterator[SourceDocument]:
    """Modules of the running Python's standard library by name, then the entries of its language reference.

    Tests are left out, and parts that distributions leave out (tkinter, idlelib, pydoc_data) may be missing.
    """
    root = _stdlib_folder()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if relative.as_posix() == _TOPICS or _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text.strip()) >= SMALLEST:
            yield SourceDocument(relative.as_posix(), text)
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        if len(text.strip()) >= SMALLEST:
            yield SourceDocument(f"topics/{name}", text)


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _held_out(documents: list[SourceDocument], labels: set[str]) -> set[str]:
    """Names of the held-out documents: in each class, and in all the rest together, those that hash lowest."""
    groups: dict[str, list[str]] = {}
    for document in documents:
        package = document.package
        groups.setdefault(package if package in labels and package is not None else "", []).append(document.name)
    held_out: set[str] = set()
    for group, names in groups.items():
        share = LABELLED_VALID_SHARE if group else VALID_SHARE
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        held_out.update(names[: round(share * len(names))])
    return held_out
