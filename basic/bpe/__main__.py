"""Compile the kernels ahead of their first use: `python -m basic.bpe`."""

import os
import time

from basic.bpe.loading import load_kernels

if __name__ == "__main__":
    start = time.perf_counter()
    load_kernels("training")
    load_kernels("encoding")
    print(f"the kernels are ready after {time.perf_counter() - start:.1f} s (process {os.getpid()})")
