"""From text to shards: work units, the processes that do them, and the folder that comes out the same every time."""
