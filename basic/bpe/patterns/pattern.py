"""Patterns: the regular expressions that divide a text into pre-tokens, by name or a user's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from typing import Any

import regex

from basic.bpe.patterns.published import ALIASES, COVERING, PUBLISHED_SPLITS, SPELLINGS
from basic.bpe.patterns.tables import automaton_of
from basic.common.errors import InvalidInputError

# What a regular expression for pre-tokens has and a name has not. Not the dot and the hyphen: "gpt-3.5" is a name.
_REGULAR_EXPRESSION = re.compile(r"[\\^$*+?|()\[\]{}]|\A\.\Z")


def is_regular_expression(pattern: str) -> bool:
    """Whether a pattern has at least one of the signs of a regular expression, so that it cannot be a name."""
    return _REGULAR_EXPRESSION.search(pattern) is not None


@dataclass(frozen=True, init=False)
class Pattern:
    """One or several regular expressions that divide a text into pre-tokens, applied one after the other.

    Each divides every pre-token of the one before into its matches and the text between them. No text is left out.

    Args:
        splits: regular expressions of the `regex` package, at least one.

    Raises:
        InvalidInputError: there is none, or one is not in the syntax of the `regex` package.

    Examples:
        >>> Pattern(r"\\p{N}", r" ?\\w+").find("a b12")
        ['a', ' b', '1', '2']
    """

    splits: tuple[str, ...]

    def __init__(self, *splits: str) -> None:
        if not splits:
            raise InvalidInputError("Pattern() needs at least one regular expression")
        for split in splits:
            if not isinstance(split, str):
                raise TypeError(f"a pattern must be a string in the syntax of the regex package, got {split!r}")
            _compile(split)
        object.__setattr__(self, "splits", splits)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pattern, self.splits

    @cached_property
    def name(self) -> str | None:
        """The name in `PATTERNS` of this pattern or of one that it is another published spelling of, or None."""
        return SPELLINGS.get(self.splits) or _NAMES.get(self.splits)

    @property
    def short_form(self) -> str | tuple[str, ...]:
        """One regular expression as a string, if `resolve_pattern` accepts it; else a tuple."""
        split = self.splits[0]
        return split if len(self.splits) == 1 and is_regular_expression(split) else self.splits

    @property
    def covers_all_text(self) -> bool:
        """Whether it certainly leaves out no character of any text; False if it has no automaton."""
        automaton = automaton_of(self.splits)
        return automaton is not None and automaton.covers

    @cached_property
    def find(self) -> Callable[..., list[str]]:
        """find(text) returns the pre-tokens of a text without special tokens.

        find(text, timeout=seconds) raises TimeoutError if one of the expressions needs more time.
        """
        if len(self.splits) == 1 and self.name in COVERING:
            return _compile(self.splits[0]).findall
        return self._find_all

    def _find_all(self, text: str, timeout: float | None = None) -> list[str]:
        pretokens = [text] if text else []
        for split in self.splits:
            pretokens = [part for pretoken in pretokens for part in _divide(_compile(split), pretoken, timeout)]
        return pretokens


def _divide(split: re.Pattern[str], text: str, timeout: float | None) -> list[str]:
    """The matches of a regular expression and the text between them; joined, they are the text."""
    parts, position = [], 0
    for match in split.finditer(text, timeout=timeout):  # ty: ignore[no-matching-overload]
        start, stop = match.span()
        parts += [part for part in (text[position:start], text[start:stop]) if part]
        position = stop
    return [*parts, text[position:]] if position < len(text) else parts


@cache
def _compile(split: str) -> re.Pattern[str]:
    try:
        return regex.compile(split)
    except regex.error as error:
        raise InvalidInputError(f"pattern {split!r} is not in the syntax of the regex package: {error}") from None


_NAMES = {splits: name for name, splits in PUBLISHED_SPLITS.items()}
PATTERNS = {name: Pattern(*splits) for name, splits in PUBLISHED_SPLITS.items()}
GPT2_PATTERN = PATTERNS["gpt2"]


def resolve_pattern(pattern: str | Pattern | None) -> Pattern:
    """Find the pattern that a name or a regular expression means.

    Args:
        pattern: a name (a key of `PATTERNS`, or a name under which one is published, such as "cl100k_base"), a regular
            expression of the `regex` package, or a `Pattern`; None means GPT-2's. All spellings of "gpt2" and "cl100k"
            give the same pattern.

    Raises:
        TypeError: the pattern is of another type.
        InvalidInputError: the pattern is neither a known name nor a regular expression of the `regex` package.
    """
    if pattern is None:
        return GPT2_PATTERN
    if isinstance(pattern, str):
        if not is_regular_expression(pattern):
            name = pattern.lower()
            try:
                return PATTERNS[ALIASES.get(name, name)]
            except KeyError:
                names = [*PATTERNS, *ALIASES]
                by_letters = {re.sub(r"\W|_", "", known): known for known in reversed(names)}
                similar = [by_letters[match] for match in get_close_matches(re.sub(r"\W|_", "", name), by_letters, 1)]
                raise InvalidInputError(
                    f"pattern {pattern!r} is neither a known name ({', '.join(names)}) nor a regular expression, which "
                    "has at least one of \\ [ ( | * + ? { ^ $; "
                    + (f"did you mean {similar[0]!r}? " if similar else "give one of them, ")
                    + f"or write Pattern({pattern!r})"
                ) from None
        pattern = Pattern(pattern)
    elif not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a name, a regular expression or a Pattern, got {pattern!r}")
    # Not the other patterns: a tokenizer's fingerprint has the spelling of its pattern.
    return PATTERNS[pattern.name] if pattern.name in ("gpt2", "cl100k") else pattern
