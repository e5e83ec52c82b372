"""``python -m benchmarks.attention_ablation``."""

from __future__ import annotations

from benchmarks.attention_ablation.cli import main
from data_pipeline.errors import run_cli

if __name__ == "__main__":
    raise SystemExit(run_cli(main, "python -m benchmarks.attention_ablation"))
