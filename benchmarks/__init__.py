"""Side-by-side measurements; each prints its table and writes a JSON with the command that made it."""
