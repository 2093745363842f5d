"""When the compiled kernels are worth loading, and how they are loaded."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np

from basic.bpe.arrays import bytes_array, special_token_arrays

# From here on the kernels are worth about a second to load them.
MIN_BYTES_FOR_KERNELS = 1 << 20

# LLVM ends the process where it gets no memory; this much is enough for Numba, its libraries and threads.
_ADDRESS_SPACE_BYTES = 2 << 30

_lock = threading.RLock()
_loaded: set[str] = set()


def kernels_pay_off(part: str, num_bytes: int, num_mapped_bytes: int = 0) -> bool:
    """Whether a text of this size should go to the kernels: it is large, or they are loaded anyway.

    Args:
        part: "training" or "encoding".
        num_bytes: of the text.
        num_mapped_bytes: how much address space the text will yet take.
    """
    if num_bytes < MIN_BYTES_FOR_KERNELS and part not in _loaded:
        return False
    return _has_address_space(num_mapped_bytes)


def _has_address_space(num_mapped_bytes: int) -> bool:
    try:
        import resource
    except ImportError:  # a system without such limits
        return True
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return True
    try:
        with open("/proc/self/statm", "rb") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return False
    return limit - used - num_mapped_bytes >= _ADDRESS_SPACE_BYTES


def load_kernels(part: str) -> None:
    """Make the kernels of a part ready, from the cache or by compiling them, which says so."""
    if part in _loaded:
        return
    with _lock:
        if part in _loaded:
            return
        from basic.bpe.kernels.instructions import cache_folder

        folder = cache_folder()
        stamp = None if folder is None else folder / f"{part}.{'-'.join(sys.version.split()[:1])}"
        is_new = stamp is None or not stamp.exists()
        if is_new:
            print(
                f"basic: compiling the kernels for {part}"
                + (", once on this machine (ahead of time: python -m basic.bpe)" if stamp else ""),
                file=sys.stderr,
                flush=True,
            )
        start = time.perf_counter()
        {"training": _warm_up_training, "encoding": _warm_up_encoding}[part]()
        if is_new:
            print(f"basic: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if stamp is not None and is_new:
            stamp.touch()
        _loaded.add(part)


def _warm_up_training() -> None:
    """Call each kernel once with the types that it will have."""
    from basic.bpe.kernels.count import PretokenCounter
    from basic.bpe.kernels.learn_merges import MergeLearner
    from basic.bpe.kernels.scan import code_classes
    from basic.bpe.kernels.sort import sort_and_sum

    data = bytes_array(b"the cat and the dog, \xc3\xa9t\xc3\xa9 " + b"long" * 300)
    counter = PretokenCounter(code_classes(), special_token_arrays([b"<|endoftext|>"]))
    counter.add_text(data, 0, len(data))
    counter.grow()
    words = sort_and_sum(counter.words())
    learner = MergeLearner(words, 3)
    learner.grow(1 << 17)
    learner.learn(3)


def _warm_up_encoding() -> None:
    from basic.bpe.kernels.apply_merges import merges_as_arrays
    from basic.bpe.kernels.decode import TokenBytes
    from basic.bpe.kernels.encode import PretokenEncoder
    from basic.bpe.kernels.scan import code_classes

    data = bytes_array(b"the cat and the dog, \xc3\xa9t\xc3\xa9 " + b"long" * 300)
    tokens = {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"the"}
    merges = merges_as_arrays({i: i for i in range(256)}, {(116, 104): 0, (256, 101): 1}, [256, 257])
    encoder = PretokenEncoder(code_classes(), merges, np.dtype(np.uint16))
    ids = encoder.encode(data, 0, len(data), (*special_token_arrays([b"<|endoftext|>"]), np.array([258])))
    encoder.grow()
    TokenBytes(tokens).decode(ids)
