"""Evaluate models, count FLOPs and memory, plot and compare runs, write reports, serve the playground."""
