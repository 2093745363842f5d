"""Checkpoints without pickle."""
