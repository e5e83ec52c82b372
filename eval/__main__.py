"""``python -m eval``: the same as ``nystrom eval``."""

from __future__ import annotations

import os

from data_pipeline.errors import run_cli
from data_pipeline.processes import immediate_exit
from eval.cli import main
from pretrain.distributed.signals import EXIT_PREEMPTED

status = run_cli(main, "nystrom eval")
# Not after a failure: a process that merely lost a peer must not end before the launcher has seen that one's end.
if status in (0, EXIT_PREEMPTED) and os.environ.get("WORLD_SIZE", "1") != "1":
    immediate_exit(status)
raise SystemExit(status)
