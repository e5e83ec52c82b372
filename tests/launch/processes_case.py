"""What the tests of launching share."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]


def leftovers(word: str) -> list[str]:
    """Command lines of living processes that mention ``word``."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if word in line and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(line)
        except psutil.Error:
            continue
    return found
