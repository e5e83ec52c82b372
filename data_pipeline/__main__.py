"""``python -m data_pipeline``: the same as ``nystrom data``."""

from data_pipeline.cli import main
from data_pipeline.errors import run_cli

raise SystemExit(run_cli(main, "nystrom data"))
