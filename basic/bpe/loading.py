"""Decides when a text is large enough for the compiled kernels, and loads them."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Generator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from basic.bpe.arrays import bytes_array
from basic.bpe.patterns.published import PUBLISHED_SPLITS
from basic.bpe.patterns.tables import automaton_of
from basic.bpe.plain import number_merges, rules_of_ranks

if TYPE_CHECKING:
    from basic.bpe.kernels.scan import PatternTables

Task = Literal["training", "encoding"]

# Compiling the kernels takes ten seconds or more. Only a text of this size may wait for them.
MIN_BYTES_FOR_KERNELS = 1 << 20

# LLVM ends the process when it gets no memory. This much is enough for Numba, its libraries and threads.
_COMPILER_BYTES = 2 << 30
# Enough for the machine code, the hash table of pre-tokens and the merges.
_KERNEL_BYTES = 256 << 20

_lock = threading.RLock()
_loaded: set[Task] = set()


def kernels_pay_off(task: Task, num_bytes: int, num_mapped_bytes: int = 0) -> bool:
    """Whether a text should use the kernels: they are compiled already, or the text is large enough to compile them.

    Args:
        num_mapped_bytes: address space that reading the text will need.
    """
    if task in _loaded or are_compiled(task):
        return _has_address_space(num_mapped_bytes + _KERNEL_BYTES)
    return num_bytes >= MIN_BYTES_FOR_KERNELS and _has_address_space(num_mapped_bytes + _COMPILER_BYTES)


def _has_address_space(num_bytes: int) -> bool:
    """Whether a limit of this process leaves so much address space."""
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
    return limit - used >= num_bytes


@cache
def are_compiled(task: Task) -> bool:
    """Whether an earlier process has compiled all kernels of a task for this processor."""
    from basic.common.native.object_files import cache_folder

    folder = cache_folder()
    return folder is not None and _stamp(task, folder).exists()


def _stamp(task: Task, folder: Path) -> Path:
    """A file that records that the kernels of a task in this folder are complete."""
    return folder / f"{task}.complete"


def load_kernels(task: Task) -> None:
    """Compile the kernels of a task, unless this or an earlier process has. A kernel is loaded at its first call."""
    if task in _loaded:
        return
    with _lock:
        if task in _loaded:
            return
        if not are_compiled(task):
            from basic.common.native.object_files import cache_folder

            compile_kernels(task, cache_folder())
        _loaded.add(task)


def compile_kernels(task: Task, cache_folder: Path | None) -> None:
    """Call each kernel of a task, so that it is compiled, and print a message."""
    if cache_folder is None:
        _compile(task, None)
        return
    stamp = _stamp(task, cache_folder)
    with _one_process_at_a_time(stamp.with_suffix(".lock")):
        if not stamp.exists():
            _compile(task, stamp)


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


def _compile(task: Task, stamp: Path | None) -> None:
    ahead = ", once on this machine (ahead of time: python -m basic.bpe)" if stamp else ""
    print(f"basic: compiling the kernels for {task}{ahead}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    {"training": _call_training_kernels, "encoding": _call_encoding_kernels}[task]()
    print(f"basic: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if stamp is not None:
        stamp.touch()


def _some_pattern() -> PatternTables:
    from basic.bpe.kernels.scan import pattern_tables

    automaton = automaton_of(PUBLISHED_SPLITS["gpt2"])
    assert automaton is not None
    return pattern_tables(automaton)


# The argument types of these calls are those of all later calls, so each kernel is compiled once.


def _call_training_kernels() -> None:
    from basic.bpe.kernels.count import PretokenCounter, sort_and_sum
    from basic.bpe.kernels.hash_table import new_table, rehash
    from basic.bpe.kernels.merges.learn_merges import MergeLearner
    from basic.bpe.kernels.special_tokens import special_token_tables

    data = bytes_array(b"the cat and the dog, \xc3\xa9t\xc3\xa9 " + b"long" * 300)
    counter = PretokenCounter(_some_pattern(), special_token_tables([b"<|endoftext|>"]))
    counter.add_text(data, 0, len(data))
    rehash(new_table(1), new_table(2))
    learner = MergeLearner(sort_and_sum(counter.pretokens()), 3, number_merges([(b"t", b"h")]))
    learner.grow(1 << 17)
    learner.learn(3)


def _call_encoding_kernels() -> None:
    from basic.bpe.kernels.decode import TokenBytes
    from basic.bpe.kernels.encoders import PretokenEncoder
    from basic.bpe.kernels.hash_table import new_table, rehash
    from basic.bpe.kernels.merges.merge_arrays import merges_as_arrays
    from basic.bpe.kernels.special_tokens import special_token_tables

    data = bytes_array(b"the cat and the dog, \xc3\xa9t\xc3\xa9 " + b"long" * 300)
    tokens = {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"the"}
    merges = merges_as_arrays(rules_of_ranks({token: i for i, token in tokens.items()}, tokens))
    encoder = PretokenEncoder(_some_pattern(), merges, np.dtype(np.uint16))
    encoder.encode(data, 0, len(data), special_token_tables([b"<|endoftext|>"], [258]))
    rehash(new_table(1), new_table(2))
    decoder = TokenBytes(tokens)
    decoder.decode(np.arange(9))
    decoder.decode_list([1])
