"""Follow the matches of one or several regular expressions through a text, one symbol at a time, never back.

A match is known to be the right one only when all threads before it in the order have failed, perhaps after many
characters. Meanwhile the next match has begun, if this one did end. So a state holds several runs of threads: the match
under way, and behind one that may have ended the one that began there. Where each began is in a register. A step has
marks, which say what is known then:

    BEGIN   a pre-token begins at this symbol
    BACK    a pre-token begins at the symbol before
    A, C    of a register: the register is this symbol from now on; a pre-token begins at the register

GPT-2's pattern, whose "\\s+(?!\\S)" takes all spaces but the last one:

    "a  b"      a         " " BEGIN      " " A: if no space follows, a pre-token begins here      b BACK: none does
"""

from __future__ import annotations

from typing import NamedTuple

from basic.bpe.patterns.parser import UnsupportedPatternError
from basic.bpe.patterns.threads import GAP, MATCH, NOTHING, ThreadList, Threads

NUM_REGISTERS = 4
BEGIN, BACK = 1, 2
A_MARKS, C_MARKS = 0b01010101 << 2, 0b10101010 << 2


def a_mark(register: int) -> int:
    return 4 << 2 * register


def c_mark(register: int) -> int:
    return 8 << 2 * register


class Run(NamedTuple):
    """A match under way.

    Attributes:
        threads: those that can make it longer or, as long as nothing is found, complete it.
        found: MATCH or GAP if it ends at the register, unless the threads succeed.
        register: where it may have ended.
    """

    threads: Threads
    found: int
    register: int


class State(NamedTuple):
    """What is known before a symbol.

    Attributes:
        runs: the match under way; then the one that began where the first may have ended; ...
        start: the register where the first run began, if it depends on that run whether a pre-token begins there: it
            does not if this is a gap and the run before it was one. Else -1.
    """

    runs: tuple[Run, ...]
    start: int


class Split:
    """One regular expression."""

    def __init__(self, threads: ThreadList) -> None:
        self._threads, self.leaves_gaps = threads, False

    def steps(self, state: State | None) -> list[tuple[int, ...]]:
        """For each symbol, all that the step depends on; if two are equal, they lead to the same state."""
        runs = () if state is None else state.runs
        return list(zip(*(self._threads.steps(run.threads) for run in runs), self._threads.first_steps, strict=True))

    def begin(self, steps: tuple[int, ...]) -> State:
        """The state behind the first symbol of a text."""
        return State((Run(self._threads.results[steps[-1]].threads, NOTHING, -1),), -1)

    def advance(self, state: State, steps: tuple[int, ...], marks_before: int) -> tuple[State, int]:
        """The state behind a symbol, and the marks of the symbol.

        Args:
            steps: of the symbol, from `steps`.
            marks_before: those of the symbol before, if it is one byte.
        """
        begin = self.begin(steps)
        runs: list[Run] = []
        start, marks = state.start, 0

        def began_at(register: int) -> int:
            if register < 0:
                return 0
            return BACK if marks_before & a_mark(register) else c_mark(register)

        for run, step in zip(state.runs, steps, strict=False):
            found, threads = self._threads.results[step]
            if found and not threads and not runs:  # it ends before this symbol
                marks |= began_at(start) if found == MATCH else 0
                return self._after(found, begin, marks)
            if threads and self._threads.certain(threads) == MATCH:  # where it could have ended does not matter
                runs.append(Run(threads, NOTHING, -1))
                break
            if found:
                if found == GAP and not threads and runs[-1].found == GAP:  # the gap before it becomes longer
                    register = runs[-1].register
                else:
                    register = run.register
                    if register < 0:
                        register = _free_register({start, *(before.register for before in runs)})
                    runs.append(Run(threads, found, register))
                runs.append(_without_threads_of(runs, begin.runs[0]))
                marks |= a_mark(register)
                break
            if threads or runs:
                runs.append(run._replace(threads=threads))
            elif run.found == MATCH:
                marks |= began_at(start) | began_at(run.register)
                start = -1
            else:
                self.leaves_gaps = True
                start = run.register
        kind = MATCH if runs[0].found == MATCH else self._threads.certain(runs[0].threads)
        if kind == MATCH:
            marks |= began_at(start)
        return State(tuple(runs), start if kind == NOTHING else -1), marks

    def _after(self, found: int, begin: State, marks: int) -> tuple[State, int]:
        """The next match begins at this symbol. After a gap it depends on this match whether a pre-token does."""
        kind = MATCH
        if found == GAP:
            self.leaves_gaps = True
            at_end = not begin.runs[0].threads
            kind = MATCH if at_end else self._threads.certain(begin.runs[0].threads)
        if kind == NOTHING:
            return begin._replace(start=0), marks | a_mark(0)  # no register is in use
        return begin, marks | (BEGIN if kind == MATCH else 0)


def _without_threads_of(before: list[Run], run: Run) -> Run:
    """A run that counts only if all runs before it fail: then the threads that it has in common with them fail too."""
    failed = {thread for other in before for thread in other.threads}
    return run._replace(threads=tuple(thread for thread in run.threads if thread not in failed))


def _free_register(used: set[int]) -> int:
    for register in range(NUM_REGISTERS):
        if register not in used:
            return register
    raise UnsupportedPatternError("a text in which too many matches are under way")


class SplitSequence:
    """Several regular expressions; each divides every pre-token of the one before.

    All but the last must find where a pre-token begins as soon as they see its first character. Then the others, which
    see the end of their text there, have not gone beyond it.
    """

    def __init__(self, splits: list[Split], end: int) -> None:
        self._splits, self._end = splits, end

    def steps(self, states: tuple[State, ...] | None) -> list[tuple[tuple[int, ...], ...]]:
        """As that of `Split`."""
        given = [None] * len(self._splits) if states is None else states
        return list(zip(*map(Split.steps, self._splits, given), strict=True))

    def begin(self, steps: tuple[tuple[int, ...], ...]) -> tuple[State, ...]:
        return tuple(split.begin(step) for split, step in zip(self._splits, steps, strict=True))

    def advance(
        self, states: tuple[State, ...], steps: tuple[tuple[int, ...], ...], marks_before: int
    ) -> tuple[tuple[State, ...], int]:
        """As that of `Split`."""
        after, marks, ends = [], 0, False
        for split, state, step in zip(self._splits, states, steps, strict=True):
            if marks and marks != BEGIN:
                raise UnsupportedPatternError("a split that looks ahead, with another split after it")
            if ends := ends or marks == BEGIN:
                _, marks = split.advance(state, split.steps(state)[self._end], marks_before)
                after.append(split.begin(step))
                marks = marks & ~A_MARKS | BEGIN
            else:
                state, marks = split.advance(state, step, marks_before)
                after.append(state)
        return tuple(after), marks
