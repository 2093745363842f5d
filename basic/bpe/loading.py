"""Decides when a text is large enough for the compiled kernels, and loads them."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from basic.bpe.arrays import bytes_array, special_token_arrays
from basic.bpe.patterns.published import PUBLISHED_SPLITS
from basic.bpe.patterns.tables import automaton_of
from basic.bpe.plain import number_merges, rules_of_ranks

if TYPE_CHECKING:
    from basic.bpe.kernels.scan import PatternTables

Task = Literal["training", "encoding"]

# Loading the kernels takes about a second. For a text of this size the plain path takes longer.
MIN_BYTES_FOR_KERNELS = 1 << 20

# LLVM ends the process when it gets no memory. This much is enough for Numba, its libraries and threads.
_MIN_ADDRESS_SPACE_BYTES = 2 << 30

_lock = threading.RLock()
_loaded: set[Task] = set()


def kernels_pay_off(task: Task, num_bytes: int, num_mapped_bytes: int = 0) -> bool:
    """Whether a text should use the kernels: they are loaded already, or the text is large enough to load them.

    Args:
        task: the kernels that are needed.
        num_bytes: of the text.
        num_mapped_bytes: address space that reading the text will need.
    """
    if num_bytes < MIN_BYTES_FOR_KERNELS and task not in _loaded:
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
    return limit - used - num_mapped_bytes >= _MIN_ADDRESS_SPACE_BYTES


def load_kernels(task: Task) -> None:
    """Load the kernels of a task, or compile them, once in a process."""
    if task in _loaded:
        return
    with _lock:
        if task in _loaded:
            return
        from basic.bpe.kernels.instructions import cache_folder

        warm_up(task, cache_folder())
        _loaded.add(task)


def warm_up(task: Task, cache_folder: Path | None) -> None:
    """Call each kernel of a task, so that it is loaded or compiled; print a message if it is compiled.

    Args:
        cache_folder: of the compiled kernels. A file in it records that those of this task are complete.
    """
    stamp = None if cache_folder is None else cache_folder / f"{task}.{'-'.join(sys.version.split()[:1])}"
    if stamp is None or stamp.exists():
        _warm_up(task, stamp)
        return
    with _one_process_at_a_time(stamp.with_suffix(".lock")):
        _warm_up(task, stamp)


@contextlib.contextmanager
def _one_process_at_a_time(path: Path) -> Generator[None]:
    """Of several processes that start together, one compiles, and the others wait for its result."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _warm_up(task: Task, stamp: Path | None) -> None:
    is_cached = stamp is not None and stamp.exists()
    if not is_cached:
        print(
            f"basic: compiling the kernels for {task}"
            + (", once on this machine (ahead of time: python -m basic.bpe)" if stamp else ""),
            file=sys.stderr,
            flush=True,
        )
    start = time.perf_counter()
    {"training": _warm_up_training, "encoding": _warm_up_encoding}[task]()
    if not is_cached:
        print(f"basic: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if stamp is not None:
            stamp.touch()


def _warm_up_pattern() -> PatternTables:
    from basic.bpe.kernels.scan import pattern_tables

    automaton = automaton_of(PUBLISHED_SPLITS["gpt2"])
    assert automaton is not None
    return pattern_tables(automaton)


# The argument types of these calls are those of all later calls, so each kernel is compiled once.


def _warm_up_training() -> None:
    from basic.bpe.kernels.count import PretokenCounter
    from basic.bpe.kernels.learn_merges import MergeLearner
    from basic.bpe.kernels.sort import sort_and_sum

    data = bytes_array(b"the cat and the dog, \xc3\xa9t\xc3\xa9 " + b"long" * 300)
    counter = PretokenCounter(_warm_up_pattern(), special_token_arrays([b"<|endoftext|>"]))
    counter.add_text(data, 0, len(data))
    counter.grow()
    learner = MergeLearner(sort_and_sum(counter.pretokens()), 3, number_merges([(b"t", b"h")]))
    learner.grow(1 << 17)
    learner.learn(3)


def _warm_up_encoding() -> None:
    from basic.bpe.kernels.apply_merges import merges_as_arrays
    from basic.bpe.kernels.decode import TokenBytes
    from basic.bpe.kernels.encode import PretokenEncoder

    data = bytes_array(b"the cat and the dog, \xc3\xa9t\xc3\xa9 " + b"long" * 300)
    tokens = {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"the"}
    merges = merges_as_arrays(rules_of_ranks({token: i for i, token in tokens.items()}, tokens))
    encoder = PretokenEncoder(_warm_up_pattern(), merges, np.dtype(np.uint16))
    ids = encoder.encode(data, 0, len(data), (*special_token_arrays([b"<|endoftext|>"]), np.array([258])))
    encoder.grow()
    TokenBytes(tokens).decode(ids)
