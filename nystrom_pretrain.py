"""The console script ``nystrom``, in a module whose name nothing else has.

It looks whether another package hides the project's own ones before it imports the first of them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def entry() -> None:
    """Run the program; exit status 2 with a message where a package of another project is in the way."""
    path = Path(__file__).resolve().parent / "launch" / "shadowing.py"
    spec = importlib.util.spec_from_file_location("nystrom_shadowing", path)
    assert spec is not None
    assert spec.loader is not None
    shadowing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shadowing)
    hidden = shadowing.message(sys.argv[1:])
    if hidden is not None:
        print(f"nystrom: error: {hidden}", file=sys.stderr)
        raise SystemExit(2)
    from launch.program import entry

    entry()
