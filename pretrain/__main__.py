"""``python -m pretrain``, also what ``deepspeed --module pretrain`` starts."""

from data_pipeline.errors import run_cli
from pretrain.cli import main

raise SystemExit(run_cli(main, "nystrom train"))
