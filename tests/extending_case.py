"""The files that docs/extending.md shows, put where a user would write them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from data_pipeline.registry import Registry
from data_pipeline.sources import formats
from data_pipeline.sources.format import FORMATS
from pretrain.model.attention import forms
from pretrain.model.attention.registry import FORMS
from pretrain.optim import kinds
from pretrain.optim.kind import KINDS

FOLDER = Path(__file__).parent / "extending"
PLACES: dict[str, tuple[Any, Registry[Any]]] = {
    "forms": (forms, FORMS),
    "kinds": (kinds, KINDS),
    "formats": (formats, FORMATS),
}
"""For each folder of files: the package that they belong in, and the registry that lists it."""


def add(name: str) -> None:
    """As if the files of a folder lay in their package: it is listed anew, and finds them."""
    package, registry = PLACES[name]
    package.__path__ = [*package.__path__, str(FOLDER / name)]
    registry.refresh()


def train(config: str) -> int:
    """Runs in the ranks: the command itself, where form, optimizer and callback have been added."""
    from data_pipeline.errors import run_cli
    from pretrain.cli import main

    for name in ("forms", "kinds"):
        add(name)
    sys.path.insert(0, str(FOLDER / "callbacks"))
    return run_cli(main, "nystrom train", ["--config", config])
