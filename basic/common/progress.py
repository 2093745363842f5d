"""Progress bars, and how many workers to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


def default_num_workers() -> int:
    """The processors this process may use, which in a container can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def progress_bar(shown: bool, **options: Any) -> Generator[Callable[[int], object]]:
    """A tqdm bar with these options, or none; yields the function that moves it on."""
    if not shown:
        yield lambda amount: None
        return
    from tqdm import tqdm  # here, so that a program without bars neither loads it nor runs its thread

    with tqdm(**options) as bar:
        yield bar.update
