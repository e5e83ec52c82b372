"""The project for Python programs: ``import nystrom_pretrain as nystrom``. docs/python.md shows all of it.

A name is imported when it is first used, so this package costs next to nothing by itself. It is also the console script
``nystrom``. Before the first import it looks whether another package hides the project's own ones, whose names are
common words.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.errors import UserError
    from eval.model import Model
    from launch.api import evaluate, load, prepare, report
    from launch.results import Results
    from launch.training import Run, train

__all__ = ["Model", "Results", "Run", "UserError", "evaluate", "load", "prepare", "report", "train"]
_PLACES = {
    "UserError": "data_pipeline.errors",
    "Model": "eval.model",
    "Results": "launch.results",
    **dict.fromkeys(("evaluate", "load", "prepare", "report"), "launch.api"),
    **dict.fromkeys(("Run", "train"), "launch.training"),
}


def __getattr__(name: str) -> Any:
    """A name of ``__all__``; ``ImportError`` with a message where a package of another project is in the way."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    hidden = _hidden(["eval"])
    if hidden is not None:
        raise ImportError(hidden)
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    """What completion offers: the names of ``__all__``, and none that this file imports."""
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})


def entry() -> None:
    """Run the program; exit status 2 with a message where a package of another project is in the way."""
    hidden = _hidden(sys.argv[1:])
    if hidden is not None:
        print(f"nystrom: error: {hidden}", file=sys.stderr)
        raise SystemExit(2)
    from launch.program import entry

    entry()


def _hidden(words: Sequence[str]) -> str | None:
    """What hides a package that the command ``words`` needs; the module that looks is read by its path."""
    path = Path(__file__).resolve().parents[1] / "launch" / "shadowing.py"
    spec = importlib.util.spec_from_file_location("nystrom_shadowing", path)
    assert spec is not None
    assert spec.loader is not None
    shadowing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shadowing)
    message: str | None = shadowing.message(words)
    return message
