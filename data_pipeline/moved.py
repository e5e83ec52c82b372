"""Names that have moved to another module stay importable from the old one for a version, with a warning."""

from __future__ import annotations

import importlib
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
