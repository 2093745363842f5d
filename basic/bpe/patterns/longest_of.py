"""One regular expression for many strings, whose search time hardly depends on their number.

Strings that begin alike share that beginning, and of many beginnings only those in a range of characters are tried:

    ["car", "cat", "cats", "dog"]    ->    ca(?:r|t(?:s)?)|dog
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

_MAX_CHOICES = 8
_MAX_DEPTH = 30  # of groups inside groups; Python's `re` has a limit


class _Choice(NamedTuple):
    first: str
    last: str  # the first characters of the strings are in this range
    expression: str


def longest_of(strings: Iterable[str]) -> str:
    """An expression for Python's `re` that matches the longest string that starts at a position.

    Args:
        strings: distinct and not empty; without any, the expression matches nothing.
    """
    return _expression(sorted(strings), _MAX_DEPTH) or "(?!)"


def _expression(strings: list[str], depth: int) -> str:
    """The same for sorted strings."""
    if depth == 0:
        return "|".join(map(re.escape, sorted(strings, key=len, reverse=True)))
    choices = []
    for first, group in groupby(strings, key=lambda string: string[0]):
        with_first = list(group)
        length = _common_length(with_first[0], with_first[-1])
        expression, rests = re.escape(with_first[0][:length]), [string[length:] for string in with_first]
        if len(rests) > 1:
            optional = rests[0] == ""
            expression += f"(?:{_expression(rests[optional:], depth - 1)})" + ("?" if optional else "")
        choices.append(_Choice(first, first, expression))
    while len(choices) > _MAX_CHOICES:
        starts = range(0, len(choices), _MAX_CHOICES)
        choices = [_in_range(choices[start : start + _MAX_CHOICES]) for start in starts]
    return "|".join(choice.expression for choice in choices)


def _common_length(one: str, other: str) -> int:
    """How many characters two strings begin with in common; of the first and the last of sorted ones, all have them."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _in_range(choices: list[_Choice]) -> _Choice:
    """Several choices as one, which is tried only where a character of their range follows."""
    first, last = choices[0].first, choices[-1].last
    expressions = "|".join(choice.expression for choice in choices)
    return _Choice(first, last, f"(?=[{re.escape(first)}-{re.escape(last)}])(?:{expressions})")
