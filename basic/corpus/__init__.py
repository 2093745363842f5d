"""Text of any size: sources, shards, counts."""
