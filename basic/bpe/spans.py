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
        ids: of the tokens.
        char_spans: `text[start:stop]` has the characters of which the token has at least one byte. So several tokens
            have the same span if they share a character.
        byte_spans: in the UTF-8 bytes of the text, where each surrogate without its other half is U+FFFD. Each span
            begins where the one before it ends.
    """

    ids: list[int]
    char_spans: list[Span]
    byte_spans: list[Span]


def find_spans(text: str, data: bytes, token_sizes: Sequence[int]) -> tuple[list[Span], list[Span]]:
    """Find the spans of tokens that are, joined, the text.

    Args:
        text: may have surrogates.
        data: its UTF-8 bytes.
        token_sizes: the number of bytes of each token, at least 1.

    Returns:
        The `char_spans` and the `byte_spans`, see `Encoding`.
    """
    ends = np.cumsum(np.array(token_sizes, np.int64))
    starts = ends - np.array(token_sizes, np.int64)
    byte_spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    if text.isascii() or not token_sizes:
        return list(byte_spans), byte_spans
    begins_character = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    character_of_byte = np.cumsum(begins_character) - 1
    first, last = character_of_byte[starts], character_of_byte[ends - 1]
    if character_of_byte[-1] + 1 == len(text):
        return list(zip(first.tolist(), (last + 1).tolist(), strict=True)), byte_spans
    # A pair of surrogates is two characters of the string, but one in UTF-8.
    offsets = np.array([*(match.start() for match in _CHARACTER.finditer(text)), len(text)])
    return list(zip(offsets[first].tolist(), offsets[last + 1].tolist(), strict=True)), byte_spans
