"""Progress bars: a widget in a notebook, a line on a terminal, nothing where output goes to a file."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any


def progress_bar(**options: Any) -> Any:
    """A bar of tqdm with these options; its ``disable`` is true where none is drawn.

    tqdm's own rule (``disable=None``) looks for a terminal. A notebook's output is none, so it gets its bar by name: a
    widget, or text where the package ipywidgets is missing. ``tqdm.auto`` would choose alike, with a warning. The text
    goes to standard output, as what is printed does: each change between two streams would draw the bar anew.
    """
    if in_notebook():
        if find_spec("ipywidgets") is not None:
            from tqdm.notebook import tqdm as drawn

            return drawn(**options)
        from tqdm import tqdm

        return tqdm(**{"file": sys.stdout, **options})
    from tqdm import tqdm

    return tqdm(**options, disable=None)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this program; IPython at a terminal is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and "IPKernelApp" in shell.config
