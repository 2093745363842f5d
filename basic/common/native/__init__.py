"""Functions over arrays as machine code: compiled by Numba, kept as object files, called without it."""
