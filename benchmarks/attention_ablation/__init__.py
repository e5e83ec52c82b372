"""The same small model with each form of attention: same tokens in the same order, same initial weights; what each form
costs in loss and in recall far back, and in time and memory. ``python -m benchmarks.attention_ablation --help``."""
