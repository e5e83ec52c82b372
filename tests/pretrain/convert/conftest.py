"""What tests of conversion share: where transformers copies the code of folders to, and tiny folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hf_case import modules_in, write_tiny


@pytest.fixture(scope="session")
def hf_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """transformers has a folder of the tests for the code of models."""
    folder = tmp_path_factory.mktemp("hf-modules")
    with modules_in(folder):
        yield folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for transformers by objective, mlm and clm, which nobody writes to."""
    root = tmp_path_factory.mktemp("folders")
    return {objective: write_tiny(root / f"tiny-{objective}", objective) for objective in ("mlm", "clm")}
