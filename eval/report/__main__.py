"""``python -m eval.report``: the same as ``nystrom report``."""

from __future__ import annotations

from data_pipeline.errors import run_cli
from eval.report.cli import main

raise SystemExit(run_cli(main, "nystrom report"))
