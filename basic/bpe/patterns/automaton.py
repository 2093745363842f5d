"""Compile a pattern to the table of a deterministic automaton, which a kernel runs (`basic.bpe.kernels.scan`).

    splits --Parser--> trees and sets --ThreadList--> threads --SplitSequence--> states --minimized--> table

The symbols are classes of characters: the characters of a class are in the same sets of the pattern.

Source of the minimization: Moore 1956, "Gedanken-experiments on sequential machines".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from basic.bpe.patterns.characters import CharacterSet, contains
from basic.bpe.patterns.matches import A_MARKS, BACK, BEGIN, C_MARKS, NUM_REGISTERS, Split, SplitSequence
from basic.bpe.patterns.parser import Parser, UnsupportedPatternError
from basic.bpe.patterns.threads import ThreadList

_MAX_STATES, _MAX_CLASSES, _MAX_SETS = 3000, 120, 62
FIRST_CLASS = 128  # the symbols before it are the ASCII characters
# The marks in the last column of the table: A marks in bits 0 to 3, C marks in bits 4 to 7, BEGIN, BACK.
C_SHIFT, PACKED_BEGIN, PACKED_BACK = 4, BEGIN << 8, BACK << 8


class Automaton(NamedTuple):
    """A pattern as tables.

    Attributes:
        table: a row for each state (uint16): the next state for each ASCII character, each class, CONTINUATION and
            END, and the marks. A state is the offset of its row. CONTINUATION is each further byte of a character.
        bounds: the first state with BACK, with both BACK and BEGIN, with BEGIN only, and with C marks. So it can be
            seen from the number of a state which marks it has (int64).
        first_codes, class_of_range: the classes of code points: those from first_codes[i] on, up to the next, have the
            class class_of_range[i] (int32, uint8).
        safe_pairs: for two classes, whether a text may be divided between their characters, whatever is around them
            (bool). The pre-tokens of both parts are then those of the text.
        covers: whether no text has a character that the last split leaves out.
    """

    table: np.ndarray
    bounds: np.ndarray
    start: int
    first_codes: np.ndarray
    class_of_range: np.ndarray
    safe_pairs: np.ndarray
    covers: bool

    @property
    def width(self) -> int:
        """The number of columns of the table."""
        return FIRST_CLASS + len(self.safe_pairs) + 3


def compile_splits(splits: Sequence[str]) -> Automaton:
    """Compile a pattern.

    Raises:
        UnsupportedPatternError: only the `regex` package can tell its pre-tokens.
    """
    parsers = [Parser(split) for split in splits]
    first_codes, class_of_range, members = _classes([each for parser in parsers for each in parser.sets])
    num_classes, members = int(class_of_range.max()) + 1, list(members)
    machines = []
    for parser in parsers:
        of_this, members = members[: len(parser.sets)], members[len(parser.sets) :]
        machines.append(Split(ThreadList(parser.tree, of_this, num_classes)))
    next_states, marks = _minimized(*_explore(SplitSequence(machines, num_classes), num_classes))
    ascii_classes = class_of_range[np.searchsorted(first_codes, np.arange(FIRST_CLASS), side="right") - 1]
    table, bounds, start = _as_table(next_states, marks, ascii_classes)
    return Automaton(
        table, bounds, start, first_codes, class_of_range,
        _safe_pairs(next_states, marks, num_classes), not machines[-1].leaves_gaps,
    )  # fmt: skip


def _classes(sets: list[CharacterSet]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Divide all code points into classes whose members are in the same sets.

    Returns:
        `first_codes` and `class_of_range`, see `Automaton`; and the classes of each set, as the bits of an integer.
    """
    if len(sets) > _MAX_SETS:
        raise UnsupportedPatternError("too large a number of sets")
    first_codes = np.unique(np.concatenate([[0], *sets]))
    first_codes = first_codes[first_codes < 0x110000]
    memberships = np.zeros(len(first_codes), np.int64)
    for number, characters in enumerate(sets):
        memberships |= contains(characters, first_codes).astype(np.int64) << number
    distinct, class_of_range = np.unique(memberships, return_inverse=True)
    if len(distinct) > _MAX_CLASSES:
        raise UnsupportedPatternError("too large a number of classes")
    classes_of_set = [
        sum(1 << number for number, membership in enumerate(distinct.tolist()) if membership >> k & 1)
        for k in range(len(sets))
    ]
    return first_codes.astype(np.int32), class_of_range.astype(np.uint8), classes_of_set


def _explore(splits: SplitSequence, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Find all states that a text can reach.

    A state of the automaton is one of the splits and the marks of the last symbol. None is the beginning of a text.

    Returns:
        The next state for each class, the end and the further bytes of a character; and the marks of each state.
    """
    end = num_classes
    dead: tuple[tuple, int] = ((), 0)  # after the end
    pending: list[tuple] = [(None, 0), dead]
    numbers, rows = {state: number for number, state in enumerate(pending)}, []
    for states, marks_before in pending:  # which grows
        row: list[int] = []
        targets: dict[tuple, tuple] = {}  # most symbols lead to one of a few states
        for symbol, steps in enumerate(splits.steps(states) if states != () else []):
            if steps not in targets:
                start = states is None
                targets[steps] = (splits.begin(steps), 0) if start else splits.advance(states, steps, marks_before)
            target = targets[steps] if symbol < end else ((), targets[steps][1])
            row.append(_number(target, numbers, pending))
        row = row or [numbers[dead]] * (end + 1)
        row.append(_number((states, 0), numbers, pending))
        rows.append(row)
        if len(rows) > _MAX_STATES:
            raise UnsupportedPatternError("too large a number of states")
    return np.array(rows), np.array([marks for _, marks in pending])


def _number(state: tuple, numbers: dict[tuple, int], pending: list[tuple]) -> int:
    if state not in numbers:
        numbers[state] = len(pending)
        pending.append(state)
    return numbers[state]


def _minimized(next_states: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make one state of all that cannot be distinguished: first by their marks, then by where the symbols lead."""
    groups, num_groups = _number_rows(marks[:, None]), 0
    while groups.max() >= num_groups:
        num_groups = int(groups.max()) + 1
        groups = _number_rows(np.column_stack([groups, groups[next_states]]))
    _, members = np.unique(groups, return_index=True)
    return groups[next_states[members]], marks[members]


def _number_rows(rows: np.ndarray) -> np.ndarray:
    """Equal rows get equal numbers, from 0 on in the order in which they come."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows])


def _as_table(
    next_states: np.ndarray, marks: np.ndarray, ascii_classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """`Automaton.table`, its bounds and its first state."""
    num_classes = next_states.shape[1] - 2
    kind = np.where(marks & C_MARKS, 4, np.array([0, 3, 1, 2])[marks & (BEGIN | BACK)])
    order = np.argsort(kind, kind="stable")
    row_of = np.argsort(order)
    columns = np.concatenate([ascii_classes, np.arange(num_classes), [num_classes + 1, num_classes]])
    width = len(columns) + 1
    if len(order) * width > 0xFFFF:
        raise UnsupportedPatternError("too large a table")
    packed = (marks & (BEGIN | BACK)) << 8
    for register in range(NUM_REGISTERS):
        packed |= (marks >> 2 + 2 * register & 1) << register | (marks >> 3 + 2 * register & 1) << C_SHIFT + register
    table = np.column_stack([row_of[next_states[:, columns]] * width, packed])[order]
    return (table.astype(np.uint16).ravel(), np.searchsorted(kind[order], [1, 2, 3, 4]) * width, int(row_of[0]) * width)


def _safe_pairs(next_states: np.ndarray, marks: np.ndarray, num_classes: int) -> np.ndarray:
    """`Automaton.safe_pairs`.

    From every state a pre-token begins at the second character; all states agree from there on; and the end of the text
    in place of the second character says the same about what is before (else "\\n\\t" before "x" would, cut off, be one
    pre-token instead of two).
    """
    end = num_classes
    alive = next_states[(next_states != next_states[:, -1:]).any(axis=1)]
    decided = marks & ~A_MARKS
    safe = np.zeros((num_classes, num_classes), bool)
    for first in range(num_classes):
        states = np.unique(alive[:, first])
        at_end = decided[next_states[states, end]] & ~BEGIN
        reached = next_states[states, :end]
        same = ((decided[reached] & ~BEGIN) == at_end[:, None]).all(axis=0) & (marks[reached] & BEGIN).all(axis=0)
        next_after = next_states[reached]
        safe[first] = same & (next_after == next_after[:1]).all(axis=(0, 2))
    return safe
