"""Kernels that learn merges, and that apply those of a tokenizer."""
