"""Notices files that hide the project's packages, whose names are common words.

The wheel installs the packages ``data_pipeline``, ``eval``, ``launch`` and ``pretrain``. A file ``eval.py`` or another
installed ``launch`` may come before them in Python's search. Without this module the user would see an ``ImportError``
from deep inside. It imports nothing of the project, since it runs before any package is trusted. The fifth package,
``configs``, is read by its path and never imported: a folder ``configs`` of one's own hides nothing.
"""

from __future__ import annotations

import os
import sys
import sysconfig
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

LIBRARIES = ("numpy", "torch", "deepspeed", "tokenizers", "datasets", "pyarrow", "pydantic", "safetensors", "yaml")
"""Libraries of this project that modules of clusters also put into PYTHONPATH."""


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


def foreign_libraries() -> str | None:
    """A note about libraries of the environment that PYTHONPATH hides, as ``module load python`` may do; else None.

    It is no error: somebody may mean it. Libraries that are in PYTHONPATH alone hide nothing.
    """
    environment = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        folder = Path(entry)
        if not entry or folder in environment:
            continue
        hidden = [name for name in LIBRARIES if _has(folder, name) and any(_has(own, name) for own in environment)]
        if hidden:
            return (
                f"PYTHONPATH has {folder}: its {', '.join(hidden)} hides what the environment {sys.prefix} has. "
                "Unless you mean that: unset PYTHONPATH, also in the jobs (setup: [..., unset PYTHONPATH])"
            )
    return None


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_dir() or (folder / f"{name}.py").is_file()


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
