"""Parse a regular expression for pre-tokens to a tree. What it does not know raises UnsupportedPatternError.

    alternation   sequence | sequence ...
    sequence      atom quantifier, atom quantifier ...           * + ? {2} {1,3} {2,}; possessive for one character
    atom          (?:alternation) (?i:alternation) (alternation), one character, or a condition on the next character:
                  (?=one) (?!one) \\Z, and $ where it means the same
    one           [a-z\\s] [^...] \\p{L} \\s \\d \\w . or a literal

These are the parts of which the published patterns are made, with the meaning that the `regex` package gives them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import regex

from basic.bpe.patterns.characters import (
    NUM_CODE_POINTS,
    CharacterSet,
    characters_between,
    complement,
    contains,
    equal_ignoring_case,
    matched_by,
    union,
)

WITHOUT_END = 1 << 30  # the upper bound of "*" and "+"
_ALL = characters_between(0, NUM_CODE_POINTS - 1)
_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v", "a": "\a"}


class UnsupportedPatternError(ValueError):
    """Only the `regex` package can find the pre-tokens of this pattern."""


@dataclass(frozen=True)
class Character:
    """One character of a set."""

    number: int


@dataclass(frozen=True)
class Condition:
    """The next character must be in a set; or, if negative, must not be in it, and may be missing."""

    number: int
    negative: bool


@dataclass(frozen=True)
class Sequence:
    """All of these, one after the other."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of these, the first that leads to a match."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Repetition:
    """`least` to `most` times, as often as possible; a possessive one never gives a character back."""

    node: Node
    least: int
    most: int
    possessive: bool


Node = Character | Condition | Sequence | Choice | Repetition


class Parser:
    """A parsed pattern.

    Raises:
        UnsupportedPatternError: the pattern has something else than the syntax above.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern, self._position = pattern, 0
        self.sets: list[CharacterSet] = []
        self._numbers: dict[bytes, int] = {}
        self.tree = self._alternation(ignore_case=False)
        if self._position < len(pattern):
            raise self._error("a bracket without its partner")

    def _error(self, what: str) -> UnsupportedPatternError:
        return UnsupportedPatternError(f"{what} at {self._pattern[self._position :][:20]!r}")

    def _number(self, characters: CharacterSet) -> int:
        key = characters.tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self.sets)
            self.sets.append(characters)
        return self._numbers[key]

    def _accept(self, expression: str) -> re.Match[str] | None:
        """Match a regular expression at the position, and move behind the match."""
        match = regex.compile(expression).match(self._pattern, self._position)
        if match:
            self._position = match.end()
        return match

    def _alternation(self, ignore_case: bool) -> Node:
        nodes = [self._sequence(ignore_case)]
        while self._accept(r"\|"):
            nodes.append(self._sequence(ignore_case))
        return nodes[0] if len(nodes) == 1 else Choice(tuple(nodes))

    def _sequence(self, ignore_case: bool) -> Node:
        nodes: list[Node] = []
        while self._position < len(self._pattern) and self._pattern[self._position] not in "|)":
            if self._accept(r"\$"):
                # "$" also matches before a newline at the end: the same if the newlines are taken already.
                if not (nodes and self._takes_newlines(nodes[-1])):
                    raise self._error("$")
                nodes.append(Condition(self._number(_ALL), negative=True))
            else:
                nodes.append(self._quantified(self._atom(ignore_case)))
        return Sequence(tuple(nodes))

    def _takes_newlines(self, node: Node) -> bool:
        return (
            isinstance(node, Repetition)
            and isinstance(node.node, Character)
            and node.most == WITHOUT_END
            and bool(contains(self.sets[node.node.number], np.array([10]))[0])
        )

    def _quantified(self, node: Node) -> Node:
        counts = self._accept(r"(?:([?*+])|\{(\d+)(,?)(\d*)\})([?+]?)")
        if counts is None:
            return node
        sign, least, comma, most, kind = counts.groups()
        if sign:
            low, high = {"?": (0, 1), "*": (0, WITHOUT_END), "+": (1, WITHOUT_END)}[sign]
        else:
            low = int(least)
            high = int(most) if most else WITHOUT_END if comma else low
        if kind == "?" or (kind == "+" and not isinstance(node, Character)):
            raise self._error("a lazy quantifier, or a possessive group")
        if self._accept(r"[?*+{]") or low > high or low > 100 or 100 < high < WITHOUT_END:
            raise self._error("a quantifier")
        if high > 1 and may_be_empty(node):  # engines differ in when such a loop ends
            raise self._error("a repetition of what may be empty")
        return Repetition(node, low, high, possessive=kind == "+")

    def _atom(self, ignore_case: bool) -> Node:
        if self._accept(r"\\Z"):
            return Condition(self._number(_ALL), negative=True)
        if group := self._accept(r"\(\?(i?):|\((?!\?)"):
            node = self._alternation(ignore_case or group[1] == "i")
        elif condition := self._accept(r"\(\?([!=])"):
            node = Condition(self._number(self._one(ignore_case)), negative=condition[1] == "!")
        elif self._pattern[self._position] in "(*+?^{":  # "{" can begin a number of errors: (?:abc){e<=1}
            raise self._error("unsupported syntax")
        else:
            return Character(self._number(self._one(ignore_case)))
        if not self._accept(r"\)"):
            raise self._error("a group without its end, or a condition on more than one character")
        return node

    def _one(self, ignore_case: bool) -> CharacterSet:
        """The characters that a set in brackets, an escape, or a literal matches."""
        if self._accept(r"\."):
            return complement(characters_between(10, 10))
        if brackets := self._accept(r"\[(\^?)"):
            parts = [self._one_in_set(ignore_case)]  # a first "]" is a literal
            while not self._accept(r"\]"):
                parts.append(self._one_in_set(ignore_case))
            return complement(union(*parts)) if brackets[1] else union(*parts)
        if escape := self._accept(_CLASS):
            return matched_by(f"(?i:{escape[0]})" if ignore_case else escape[0])
        literal = self._literal()
        return self._range(ignore_case, literal, literal)

    def _one_in_set(self, ignore_case: bool) -> CharacterSet:
        if self._accept(r"&&|\|\||--|~~|\["):
            raise self._error("an operation with sets")
        if escape := self._accept(_CLASS):
            return matched_by(f"(?i:{escape[0]})" if ignore_case else escape[0])
        first = self._literal()
        return self._range(ignore_case, first, self._literal() if self._accept(r"-(?!\])") else first)

    def _range(self, ignore_case: bool, first: int, last: int) -> CharacterSet:
        if first > last:
            raise self._error("an empty range")
        if not ignore_case:
            return characters_between(first, last)
        if first == last:
            return equal_ignoring_case(first)
        return matched_by(f"(?i:[\\U{first:08x}-\\U{last:08x}])")

    def _literal(self) -> int:
        if code := self._accept(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})"):
            return int(code[1] or code[2] or code[3], 16)
        if escape := self._accept(r"\\([rntfva]|[^\w\s]| )"):
            return ord(_ESCAPES.get(escape[1], escape[1]))
        if not (character := self._accept(r"[^\\]")):
            raise self._error("unsupported syntax")
        return ord(character[0])


_CLASS = r"\\[pP]\{\^?\w+\}|\\[pP]\w|\\[sSdDwW]"


def may_be_empty(node: Node) -> bool:
    """Whether a node can match without taking a character."""
    if isinstance(node, Sequence):
        return all(map(may_be_empty, node.nodes))
    if isinstance(node, Choice):
        return any(map(may_be_empty, node.nodes))
    if isinstance(node, Repetition):
        return node.least == 0 or may_be_empty(node.node)
    return isinstance(node, Condition)
