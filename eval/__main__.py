"""``python -m eval``: the same as ``nystrom eval``."""

from __future__ import annotations

import os

from data_pipeline.errors import run_cli
from data_pipeline.processes import leave
from eval.cli import main

status = run_cli(main, "nystrom eval")
if os.environ.get("WORLD_SIZE", "1") != "1":
    leave(status)
raise SystemExit(status)
