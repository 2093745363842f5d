"""Triton kernels, and the choice between them and the plain functions."""
