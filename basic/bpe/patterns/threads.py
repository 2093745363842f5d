"""A regular expression as a non-deterministic automaton with ordered threads.

The threads are kept in the order in which a backtracking engine would try them. So the first one that accepts has the
match that this engine finds (leftmost-first), and threads after it can be dropped.

What the expression leaves out is found by a thread that is tried last, and takes any one character.

Sources: Thompson 1968, "Regular expression search algorithm"; Cox 2010, "Regular expression matching in the wild" (RE2:
leftmost-first by ordered threads; Rust's regex-automata does the same).
"""

from __future__ import annotations

from typing import NamedTuple

from basic.bpe.patterns.parser import (
    WITHOUT_END,
    Character,
    Choice,
    Condition,
    Node,
    Repetition,
    UnsupportedPatternError,
)

# What a list of threads found before a symbol: nothing yet, a match that ends there, or one character that is left out.
NOTHING, MATCH, GAP = 0, 1, 2

Threads = tuple[int, ...]
# Instead of the number of an instruction: the thread accepts before the next symbol.
_ACCEPT = {MATCH: -1, GAP: -2}


class Step(NamedTuple):
    """What happens at a symbol.

    Attributes:
        found: the first thread that accepts before the symbol: a MATCH, a GAP, or NOTHING.
        threads: those before it in the order, after the symbol.
    """

    found: int
    threads: Threads


class ThreadList:
    """The automaton of a regular expression.

    A thread is the number of an instruction: ("take", symbols, next), ("test", symbols, next), ("fork", nexts). Sets of
    symbols are the bits of an integer. Symbols are the classes of characters, and then the end of the text.

    Args:
        symbols_of_set: of each of its sets of characters.

    Raises:
        UnsupportedPatternError: the expression can match nothing.
    """

    def __init__(self, tree: Node, symbols_of_set: list[int], end: int) -> None:
        self._symbols_of_set, self._end, self._all = symbols_of_set, end, (2 << end) - 1
        self._code: list[tuple] = []
        self._steps: dict[Threads, list[int]] = {}
        self._numbers: dict[Step, int] = {}
        self._certain: dict[Threads, int] = {}
        self.results: list[Step] = []
        gap = self._add("take", self._all ^ 1 << end, _ACCEPT[GAP])
        start = self._add("fork", [self._emit(tree, _ACCEPT[MATCH]), gap])
        self.first_steps = self.steps((start,))
        if any(self.results[step].found for step in self.first_steps[:end]):
            raise UnsupportedPatternError("a match that takes no character")

    def _add(self, *instruction: object) -> int:
        self._code.append(instruction)
        return len(self._code) - 1

    def _emit(self, node: Node, following: int) -> int:
        """Add the instructions of a node, which lead to `following`; returns the first one."""
        if isinstance(node, Character):
            return self._add("take", self._symbols_of_set[node.number], following)
        if isinstance(node, Condition):
            return self._add("test", self._symbols_of_set[node.number] ^ (self._all if node.negative else 0), following)
        if isinstance(node, Choice):
            return self._add("fork", [self._emit(choice, following) for choice in node.nodes])
        if isinstance(node, Repetition):
            return self._emit_repetition(node, following)
        for part in reversed(node.nodes):
            following = self._emit(part, following)
        return following

    def _emit_repetition(self, node: Repetition, following: int) -> int:
        leave = following
        if node.possessive:  # it ends before the largest number only where the character does not follow
            assert isinstance(node.node, Character)
            leave = self._add("test", self._all ^ self._symbols_of_set[node.node.number], following)
        entry = following
        if node.most == WITHOUT_END:
            loop: list[int] = []
            entry = self._add("fork", loop)
            loop += [self._emit(node.node, entry), leave]
        else:
            for _ in range(node.most - node.least):
                entry = self._add("fork", [self._emit(node.node, entry), leave])
        for _ in range(node.least):
            entry = self._emit(node.node, entry)
        return entry

    def steps(self, threads: Threads) -> list[int]:
        """For each symbol the number of the step in `results`."""
        if threads not in self._steps:
            paths = self._paths(threads)
            self._steps[threads] = [self._number(self._step(paths, 1 << symbol)) for symbol in range(self._end + 1)]
        return self._steps[threads]

    def _number(self, step: Step) -> int:
        if step not in self._numbers:
            self._numbers[step] = len(self.results)
            self.results.append(step)
        return self._numbers[step]

    @staticmethod
    def _step(paths: list[tuple[int, int, int]], symbol: int) -> Step:
        threads: list[int] = []
        for symbols, found, thread in paths:
            if symbols & symbol:
                if found:
                    return Step(found, tuple(threads))
                if thread not in threads:
                    threads.append(thread)
        return Step(NOTHING, tuple(threads))

    def _paths(self, threads: Threads) -> list[tuple[int, int, int]]:
        """In order: if the next symbol is one of these, accept (MATCH or GAP), or take it; the thread after it."""
        paths, seen = [], set()
        stack = [(thread, self._all) for thread in reversed(threads)]
        while stack:
            thread, symbols = stack.pop()
            if symbols == 0 or (thread, symbols) in seen:
                continue
            seen.add((thread, symbols))
            if thread < 0:
                paths.append((symbols, -thread, thread))
                continue
            kind, *rest = self._code[thread]
            if kind == "fork":
                stack.extend((choice, symbols) for choice in reversed(rest[0]))
            elif kind == "test":
                stack.append((rest[1], symbols & rest[0]))
            elif symbols & rest[0]:
                paths.append((symbols & rest[0], NOTHING, rest[1]))
        return paths

    def certain(self, threads: Threads) -> int:
        """What threads find, whatever follows: MATCH or GAP, or NOTHING if it depends on what follows."""
        if threads not in self._certain:
            found = {self.results[step].found for step in self.steps(threads)}
            certain = MATCH if found == {MATCH} else NOTHING
            self._certain[threads] = GAP if threads == (_ACCEPT[GAP],) else certain
        return self._certain[threads]
