"""The fast core of byte-pair encoding: compiled kernels, and the plain functions for small texts."""
