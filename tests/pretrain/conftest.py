"""What tests of training share: one small corpus for all of them, which nobody writes to."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_case import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the shards ``train`` and ``valid``."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder
