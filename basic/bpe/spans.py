"""Where the tokens of a text are in it, in characters and in bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Span = tuple[int, int]

_CHARACTER = re.compile("[\ud800-\udbff][\udc00-\udfff]|.", re.DOTALL)


class Encoding(NamedTuple):
    """The ids of a text, and the span of each token: the offset where it begins, and that where it ends.

    Attributes:
        char_spans: `text[start:stop]` has the characters of which the token has at least one byte. So several tokens
            have the same span if they share a character.
        byte_spans: in the UTF-8 bytes of the text, where each surrogate without its other half is U+FFFD. Each span
            begins where the one before it ends, unless normalization has joined or reordered characters: then each of
            their tokens has the span of all of them.
    """

    ids: list[int]
    char_spans: list[Span]
    byte_spans: list[Span]


def find_spans(
    text: str, data: bytes, token_sizes: Sequence[int], origins: Sequence[tuple[int, int, bool]] | None = None
) -> tuple[list[Span], list[Span]]:
    """Find the spans of tokens.

    Args:
        data: the UTF-8 bytes of the text, or of what it was changed to before it was split: those of all tokens.
        token_sizes: the number of bytes of each token, at least 1.
        origins: if it was changed, for each character of `data` the span of those of the text that it was made of, and
            whether it is still the same. Pairs of surrogates are one character.

    Returns:
        The `char_spans` and the `byte_spans`, see `Encoding`.
    """
    ends = np.cumsum(np.array(token_sizes, np.int64))
    starts = ends - np.array(token_sizes, np.int64)
    byte_spans = _pairs(starts, ends)
    if not token_sizes or (text.isascii() and origins is None):
        return list(byte_spans), byte_spans
    first_bytes = _first_bytes(data)
    first, last = (np.searchsorted(first_bytes, at, "right") - 1 for at in (starts, ends - 1))
    stops = last + 1
    if origins is not None:
        begins, stops_of, is_same = np.array(origins, np.int64).T
        text_bytes = _first_bytes(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())
        # A token may begin or end inside a character; of one that was made of others, it has all of them.
        byte_starts = text_bytes[begins[first]] + np.where(is_same[first], starts - first_bytes[first], 0)
        inside = text_bytes[begins[last]] + ends - first_bytes[last]
        byte_spans = _pairs(byte_starts, np.where(is_same[last], inside, text_bytes[stops_of[last]]))
        first, stops, num_characters = begins[first], stops_of[last], len(text_bytes) - 1
    else:
        num_characters = len(first_bytes) - 1
    if num_characters < len(text):  # a pair of surrogates is two characters of the string, but one in UTF-8
        offsets = np.array([*(match.start() for match in _CHARACTER.finditer(text)), len(text)])
        first, stops = offsets[first], offsets[stops]
    return _pairs(first, stops), byte_spans


def _first_bytes(data: bytes) -> np.ndarray:
    """The offset of each character in UTF-8, and the end."""
    return np.flatnonzero(np.append((np.frombuffer(data, np.uint8) & 0xC0) != 0x80, True))


def _pairs(starts: np.ndarray, stops: np.ndarray) -> list[Span]:
    return list(zip(starts.tolist(), stops.tolist(), strict=True))
