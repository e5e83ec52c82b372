"""The same small model with each change of its blocks, on real text: what each one is worth at equal tokens and at
equal time. ``python -m benchmarks.block_ablation --help``."""
