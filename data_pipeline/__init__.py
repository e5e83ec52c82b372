"""Text to batches: documents stream in once, immutable shards lie on disk, and training reads them by position."""

__version__ = "0.1.0"
