"""Names that have moved to another module, or were renamed, stay importable for a version, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any


def moved(old: str, new: str, *names: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of module ``old``, whose ``names`` are in module ``new`` now."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        # The caller's line: between it and here is only the import machinery, which Python leaves out of the count.
        warnings.warn(f"{old}.{name} has moved to {new}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(new), name)

    return get


def renamed(module: str, **names: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``module``, in which the old ``names`` have the new ones that they are given here."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {module}.{names[name]}", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], names[name])

    return get
