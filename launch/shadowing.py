"""Notices files that hide the project's packages, whose names are common words.

The wheel installs the packages ``data_pipeline``, ``eval``, ``launch`` and ``pretrain``. A file ``eval.py`` or another
installed ``launch`` may come before them in Python's search. Without this module the user would see an ``ImportError``
from deep inside. It imports nothing of the project, since it runs before any package is trusted. The fifth package,
``configs``, is read by its path and never imported: a folder ``configs`` of one's own hides nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
"""The folder that holds the project's own packages."""
BELOW = ("data_pipeline", "pretrain")
NEEDED = {"data": ("data_pipeline",), "eval": (*BELOW, "eval"), "report": (*BELOW, "eval")}
"""The packages that a command imports; one that is not here imports ``BELOW``."""
STARTS_PROCESSES = ("launch", "demo")
"""Commands that start ``python -m ...``, which searches the working directory first."""


def message(words: Sequence[str]) -> str | None:
    """What hides a package that the command ``words`` needs, and what to do; None if nothing does."""
    command = words[0] if words else ""
    needed = NEEDED.get(command, BELOW)
    if command == "demo" or (command == "launch" and "--" in words):
        needed = (*BELOW, "eval")
    for name in ("launch", *needed):
        places = [_search(name, sys.path)]
        if command in STARTS_PROCESSES:
            places.append(_search(name, [os.getcwd(), *sys.path]))
        for found in places:
            if HOME / name not in found:
                return _explain(name, found)
    return None


def _search(name: str, path: Sequence[str]) -> list[Path]:
    """The folders of the package that an import of ``name`` finds, or its file if it is no package; [] if none."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(name, list(path) if finder is PathFinder else None) if find else None
        if spec is not None:
            places = spec.submodule_search_locations or [spec.origin or ""]
            return [Path(place).resolve() for place in places]
    return []


def _explain(name: str, found: Sequence[Path]) -> str:
    own = HOME / name
    if not found:
        return f"the package '{name}' is missing from {HOME}: install nystrom-pretrain again"
    here = Path.cwd()
    text = f"'{name}' is found in {found[0]}, which hides nystrom's own package {own}: "
    if found[0].parent == here:
        return text + f"rename {found[0].name}, or run the command from another folder"
    return text + "take that folder out of PYTHONPATH, or install nystrom-pretrain in an environment of its own"
