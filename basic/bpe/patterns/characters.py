"""Sets of characters as sorted boundaries: those of [a-z] are 97, 123. Which characters a class has, `regex` says.

So our automata and the `regex` package agree by construction, whatever version of Unicode it knows.
"""

from __future__ import annotations

from functools import cache, reduce

import numpy as np
import regex

NUM_CODE_POINTS = 0x110000

# The code points at which membership changes: in the set from the first one on, out of it from the second one on, ...
CharacterSet = np.ndarray


@cache
def _all_characters() -> str:
    code_points = np.arange(NUM_CODE_POINTS, dtype="<u4")
    code_points[0xD800:0xE000] = 0x21  # surrogates are not characters: "!" instead
    return code_points.tobytes().decode("utf-32-le")


@cache
def matched_by(expression: str) -> CharacterSet:
    """The characters that a regular expression for one character matches; takes 20 ms the first time."""
    spans = [match.span() for match in regex.finditer(f"(?:{expression})+", _all_characters())]
    return np.array(spans, np.int64).ravel()


@cache
def equal_ignoring_case(code_point: int) -> CharacterSet:
    """What (?i:x) matches; (?i:s) also matches U+017F."""
    if code_point >= 128:
        return matched_by(f"(?i:\\U{code_point:08x})")
    candidates = matched_by(r"(?i:[\x00-\x7f])").reshape(-1, 2).tolist()
    one = regex.compile(f"(?i:\\x{code_point:02x})")
    characters = [code for start, stop in candidates for code in range(start, stop) if one.match(chr(code))]
    return union(*(characters_between(code, code) for code in characters))


def characters_between(first: int, last: int) -> CharacterSet:
    return np.array([first, last + 1], np.int64)


def union(*sets: CharacterSet) -> CharacterSet:
    return reduce(_union, sets, np.zeros(0, np.int64))


def _union(one: CharacterSet, other: CharacterSet) -> CharacterSet:
    boundaries = np.unique(np.concatenate([one, other]))
    is_in = contains(one, boundaries) | contains(other, boundaries)
    return boundaries[np.diff(is_in, prepend=False)]


def complement(characters: CharacterSet) -> CharacterSet:
    """All other code points."""
    boundaries = np.concatenate([[0], characters, [NUM_CODE_POINTS]])
    start = 2 if len(characters) and characters[0] == 0 else 0
    stop = len(boundaries) - 2 if len(characters) and characters[-1] == NUM_CODE_POINTS else len(boundaries)
    return boundaries[start:stop]


def contains(characters: CharacterSet, code_points: np.ndarray) -> np.ndarray:
    """Which code points are in a set."""
    return np.searchsorted(characters, code_points, side="right") % 2 == 1
