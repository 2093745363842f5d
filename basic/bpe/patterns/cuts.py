"""Where a text may be divided, so that the pre-tokens of the parts are those of the text.

Between the characters of safe pairs (`Automaton.safe_pairs`) that is so whatever is around them. A text without such a
pair may be divided where its automaton, which has read all of it, has found that a pre-token begins.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from itertools import chain

import numpy as np

from basic.bpe.patterns.automaton import C_SHIFT, FIRST_CLASS, PACKED_BACK, PACKED_BEGIN, Automaton
from basic.bpe.patterns.matches import NUM_REGISTERS
from basic.bpe.patterns.tables import automaton_of

_SHORTEST_SEARCH, _LONGEST_SEARCH = 64, 4096  # characters that are looked at together
_NUM_RECENT = 64  # starts of pre-tokens that are remembered


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
        codes = _code_points(text)
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


def last_settled_position(splits: tuple[str, ...], text: str) -> int:
    """The last position where a text may be divided whatever follows it, known from its beginning; 0 if none is known.

    Pre-tokens that the first split has found are not changed by later text, and the other splits look at each alone.
    What ends where the text is divided must also end there if nothing follows, which a pattern that looks ahead may see
    differently: that is tried.

    Args:
        text: a pre-token begins with it.
    """
    automaton, table = _first_split(splits)
    if automaton is None:
        return 0
    recent = deque([(0, -1)], maxlen=_NUM_RECENT)
    recent.extend(_known_starts(automaton, table, _symbols(automaton, text)))
    for stop, _ in reversed(recent):
        known = [start for start, index in recent if index < stop]
        if not known:
            break
        origin = known[-1]
        symbols = chain(_symbols(automaton, text[origin:stop]), [automaton.width - 2])  # END
        alone = [origin + start for start, _ in _known_starts(automaton, table, symbols)]
        if [start for start in alone if start < stop] == [start for start, _ in recent if origin < start < stop]:
            return stop
    return 0


@cache
def _first_split(splits: tuple[str, ...]) -> tuple[Automaton | None, list[int]]:
    """The automaton of the first split, and its table as a list."""
    automaton = automaton_of(splits[:1])
    return automaton, [] if automaton is None else automaton.table.tolist()


def _symbols(automaton: Automaton, text: str) -> Iterator[int]:
    """The symbol of each character; a few at a time, because a list takes much memory."""
    for start in range(0, len(text), _LONGEST_SEARCH):
        codes = _code_points(text[start : start + _LONGEST_SEARCH])
        ranges = np.searchsorted(automaton.first_codes, codes, side="right") - 1
        yield from (automaton.class_of_range[ranges].astype(np.int64) + FIRST_CLASS).tolist()


def _known_starts(automaton: Automaton, table: list[int], symbols: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Where pre-tokens start after the first, each with the index of the symbol that shows it.

    The plain version of `basic.bpe.kernels.scan`; a character is one symbol here.
    """
    registers, state, last_column = [0] * NUM_REGISTERS, automaton.start, automaton.width - 1
    for index, symbol in enumerate(symbols):
        state = table[state + symbol]
        if marks := table[state + last_column]:
            for register in range(NUM_REGISTERS):
                if marks >> C_SHIFT + register & 1:
                    yield registers[register], index
                if marks >> register & 1:
                    registers[register] = index
            if marks & PACKED_BACK:
                yield index - 1, index
            if marks & PACKED_BEGIN:
                yield index, index


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
