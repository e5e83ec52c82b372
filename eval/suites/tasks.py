"""Moved to ``eval.task``; importable from here for one version."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    from eval import task

    if name == "TASKS":
        warnings.warn("eval.suites.tasks.TASKS is eval.task.tasks() now", DeprecationWarning, stacklevel=2)
        return task.tasks()
    if name == "Task":
        warnings.warn("eval.suites.tasks.Task has moved to eval.task.Task", DeprecationWarning, stacklevel=2)
        return task.Task
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
