"""The page that shows what a shard folder holds."""
