"""``python -m benchmarks.curriculum``."""

from __future__ import annotations

import sys

from benchmarks.curriculum.cli import main
from data_pipeline.errors import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main, "benchmarks.curriculum"))
