"""Byte-pair encoding as compiled kernels over arrays (Numba)."""
