"""Where a text may be divided, so that the pre-tokens of the parts are those of the text (`Automaton.safe_pairs`)."""

from __future__ import annotations

import hashlib
from functools import cache, cached_property

import numpy as np

from basic.bpe.patterns.automaton import Automaton
from basic.bpe.patterns.tables import automaton_of

_SHORTEST_SEARCH, _LONGEST_SEARCH = 64, 4096  # characters that are looked at together


class SafeCuts:
    """Finds the positions between characters at which a text may be divided."""

    def __init__(self, automaton: Automaton) -> None:
        self._first_codes, self._class_of_range = automaton.first_codes, automaton.class_of_range
        self._is_safe = automaton.safe_pairs

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; other classes of characters or other pairs of them have another one."""
        digest = hashlib.sha256(b"safe cuts")
        for array in (self._first_codes, self._class_of_range, self._is_safe):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def positions(self, text: str) -> np.ndarray:
        """The indices of all characters before which the text may be divided, ascending."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        # A byte that is not UTF-8 is decoded to a surrogate, and may be replaced by U+FFFD.
        is_byte = (codes >= 0xDC80) & (codes < 0xDD00)
        codes = np.where(is_byte, 0xFFFD, codes)
        classes = self._class_of_range[np.searchsorted(self._first_codes, codes, side="right") - 1]
        is_safe = self._is_safe[classes[:-1], classes[1:]]
        # Several of these bytes may together become one U+FFFD.
        return np.flatnonzero(is_safe & ~(is_byte[:-1] & is_byte[1:])) + 1

    def last_position(self, text: str, start: int, stop: int) -> int:
        """The last such index in text[start : stop + 1]; `start` if there is none after it."""
        length = _SHORTEST_SEARCH
        while stop > start:
            first = max(start, stop - length)
            positions = self.positions(text[first : stop + 1])
            if len(positions):
                return first + int(positions[-1])
            stop, length = first, min(4 * length, _LONGEST_SEARCH)
        return start


@cache
def safe_cuts_of(splits: tuple[str, ...]) -> SafeCuts | None:
    """The safe cuts of a pattern; None if the pattern has no automaton."""
    automaton = automaton_of(splits)
    return None if automaton is None else SafeCuts(automaton)
