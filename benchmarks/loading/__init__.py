"""Token ids on disk to batches: ours beside a bare memory map, `datasets`, datatrove and others, in one run."""
