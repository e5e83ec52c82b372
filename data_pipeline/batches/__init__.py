"""From shards to batches: order, mixtures, packing, masking and loading, all pure functions of the position."""

IGNORE = -100
"""The label of a position without a loss: PyTorch's ``ignore_index``."""
