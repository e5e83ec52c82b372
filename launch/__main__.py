"""``python -m launch``."""

from data_pipeline.errors import run_cli
from launch.cli import main

raise SystemExit(run_cli(main, "nystrom launch"))
