"""Fixtures of the data pipeline's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from prepare_case import SMALL_UNIT, TEXTS, write_inputs

from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    """A vocabulary of 320 tokens."""
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Six files of 40 documents."""
    return write_inputs(tmp_path / "inputs")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of about one of the six files."""
    monkeypatch.setattr("data_pipeline.prepare.plan.unit_bytes", lambda size: SMALL_UNIT)
