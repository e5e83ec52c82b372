"""``python -m benchmarks.memory``."""

from __future__ import annotations

import sys

from benchmarks.memory.cli import main
from data_pipeline.errors import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main, "benchmarks.memory"))
