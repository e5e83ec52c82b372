"""What tests of training share: one small corpus for all of them, which nobody writes to."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks, values
from striking_case import run_settings, train
from training_case import write_config, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the shards ``train`` and ``valid``."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run, which nobody writes to."""
    runs = tmp_path_factory.mktemp("whole")
    config = write_config(runs / "whole.yaml", run_settings(corpus, runs))
    assert values(run_ranks(train, 2, config=config)) == [0, 0]
    return runs / "run"
