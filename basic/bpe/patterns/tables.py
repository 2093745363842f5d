"""The compiled form of each pattern, made once in a process and kept in a file for later ones."""

from __future__ import annotations

import hashlib
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import regex

from basic.bpe.patterns.automaton import Automaton, compile_splits
from basic.bpe.patterns.parser import UnsupportedPatternError
from basic.common.native.cache_files import kept_arrays


@cache
def automaton_of(splits: tuple[str, ...]) -> Automaton | None:
    """The automaton of a pattern, or None if only the `regex` package can find its pre-tokens; then with a warning.

    Args:
        splits: regular expressions, applied one after the other.
    """
    try:
        arrays: Any = kept_arrays(_file_of(splits), lambda: compile_splits(splits)._asdict())
    except UnsupportedPatternError as error:
        warnings.warn(
            f"the pattern {', '.join(map(repr, splits))} has no kernels, the regex package finds its pre-tokens: there "
            f"is {error}",
            stacklevel=2,
        )
        return None
    start, covers = int(arrays.pop("start")), bool(arrays.pop("covers"))
    return Automaton(start=start, covers=covers, **arrays)


def _file_of(splits: tuple[str, ...]) -> Path | None:
    """The file for a pattern, named by all that the automaton depends on; None if no folder for it is known."""
    folder = os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).with_name("__pycache__")
    if not Path(folder).is_absolute():
        return None
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(repr((splits, regex.__version__, np.__version__)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return Path(folder) / "basic_patterns" / f"{digest.hexdigest()[:24]}.automaton"
