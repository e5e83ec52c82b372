"""What tests of fine-tuning share: tiny folders for transformers, which nobody writes to."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_folder_case import export, loaded_model


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder by objective, mlm and clm."""
    root = tmp_path_factory.mktemp("folders")
    return {kind: export(loaded_model(objective=kind), root / f"tiny-{kind}") for kind in ("mlm", "clm")}
