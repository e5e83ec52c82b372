"""``python -m pretrain``, also what ``deepspeed --module pretrain`` starts."""

from __future__ import annotations

import os

from data_pipeline.errors import run_cli
from data_pipeline.processes import leave
from pretrain.cli import main

status = run_cli(main, "nystrom train")
if os.environ.get("WORLD_SIZE", "1") != "1":
    leave(status)
raise SystemExit(status)
