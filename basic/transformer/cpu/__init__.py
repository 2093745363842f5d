"""Operators for float32 on a CPU, and their kernels."""
