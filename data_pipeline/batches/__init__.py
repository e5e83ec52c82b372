"""From shards to batches: order, mixtures, packing, masking and loading, all pure functions of the position."""
