"""Patterns that find pre-tokens: the published ones, and their compilation to tables."""
