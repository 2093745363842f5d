"""Progress bars, the default number of workers, and the memory of a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from basic.common.arguments import check_size


def default_num_workers() -> int:
    """The number of processors that this process may use; in a container it can be less than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve_num_threads(num_threads: int | None) -> int:
    """The number of threads, by default one for each processor that this process may use.

    Raises:
        InvalidInputError: the number is less than 1.
    """
    return default_num_workers() if num_threads is None else check_size("num_threads", num_threads)


@contextmanager
def progress_bar(shown: bool, **options: Any) -> Generator[Callable[[int], object]]:
    """Show a progress bar while the block runs, or none if `shown` is false.

    Yields:
        A function that advances the bar by an amount.
    """
    if not shown:
        yield lambda amount: None
        return
    from tqdm import tqdm  # imported late: tqdm starts a thread

    with tqdm(**options) as bar:
        yield bar.update


def peak_memory_bytes() -> tuple[int, int]:
    """The most memory that this process has had, and the largest of its workers; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0, 0
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
    )


def peak_memory() -> str:
    """Describe the peak memory of this process and of its workers."""
    own, worker = (size / 1e6 for size in peak_memory_bytes())
    return f"peak memory {own:.0f} MB" + (f" and {worker:.0f} MB a worker" if worker else "")
