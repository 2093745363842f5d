"""What a process does: progress bars, threads and their default number, memory, and imports only when needed."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

from basic.common.arguments import check_size

T = TypeVar("T")
R = TypeVar("R")


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


def map_in_threads(
    function: Callable[[T], R], items: Iterable[T], num_threads: int, *, most_waiting: int
) -> Generator[R]:
    """Yield results in the order of the items, with a bounded number of them in memory; closing it ends the threads.

    Args:
        most_waiting: results, finished or not, beside the one that is yielded.
    """
    with ThreadPoolExecutor(num_threads) as executor:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(executor.submit(function, item))
                if len(waiting) > most_waiting:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


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


def lazy_names(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names are imported when they are first used (PEP 562).

    So `from basic.training import TrainConfig` does not import torch, which takes seconds.

    Args:
        modules: for each name its module, from the package `basic` on.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"basic.{modules[name]}"), name)

    return __getattr__
