"""Progress bars, and the default number of workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


def default_num_workers() -> int:
    """The number of processors that this process may use; in a container it can be less than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def progress_bar(shown: bool, **options: Any) -> Generator[Callable[[int], object]]:
    """Show a progress bar while the block runs, or none if `shown` is false.

    Args:
        options: the arguments of `tqdm`.

    Yields:
        A function that advances the bar by an amount.
    """
    if not shown:
        yield lambda amount: None
        return
    from tqdm import tqdm  # imported late: tqdm starts a thread

    with tqdm(**options) as bar:
        yield bar.update
