"""``python -m eval``: the same as ``nystrom eval``."""

from __future__ import annotations

from data_pipeline.errors import run_cli
from eval.cli import main

raise SystemExit(run_cli(main, "nystrom eval"))
