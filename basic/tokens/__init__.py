"""Token ids on disk."""
