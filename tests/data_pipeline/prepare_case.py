"""A small corpus in several files, cut into several units: what the tests of preparing share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.prepare.plan import Preparation, Settings, plan_preparation
from data_pipeline.prepare.run import PrepareOptions, prepare
from data_pipeline.tokenization.tokenizer import Tokenizer

TEXTS = [f"document {i} says {'word ' * (i % 23)}and {i * i}" for i in range(240)]
SMALL_UNIT = 5000  # bytes, about one of the six files; 4 MiB outside tests


class Crash(BaseException):
    """Ends a run in the middle."""


def write_inputs(folder: Path) -> Path:
    """Six JSONL files of 40 documents."""
    folder.mkdir()
    for part in range(6):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[part * 40 : part * 40 + 40])
        (folder / f"{part}.jsonl").write_text(lines)
    return folder


def plan(inputs: Path, tokenizer: Tokenizer, **settings: object) -> Preparation:
    """The preparation of the inputs with small shards."""
    preparation = plan_preparation([inputs], tokenizer, Settings(**{"shard_tokens": 500, **settings}))  # type: ignore[arg-type]
    assert len(preparation.units) > 2
    return preparation


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def crash_after(units: int, preparation: Preparation, folder: Path, how: PrepareOptions | None = None) -> None:
    """Prepare until so many units have been tokenized, and stop without any tidying."""
    left = units

    def count(size: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Crash

    with pytest.raises(Crash):
        prepare(preparation, folder, how, on_text=count)
