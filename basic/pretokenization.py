"""Pre-tokenization: split a text at special tokens, and the text between them with a pattern.

Byte-pair encoding merges inside a pre-token only. The patterns leave nothing out:

    "I've 2 cats.<|endoftext|>"  ->  ["I", "'ve", " 2", " cats", "."], "<|endoftext|>"

Neither a special token nor a pre-token depends on more than a few characters after it. So a text can be processed as a
stream (`pretokenize_stream`), or in chunks that start and end at safe positions (`chunk_ends`). The result is that of
the complete text.

A safe position is a position where a pre-token or a special token ends, whatever the text around it is: between two
characters of certain classes, which the automaton of the pattern tells (`basic.bpe.patterns`), or the start of a
special token, but never inside a possible special token. With GPT-2's pattern, for example, white space after another
character. Of a pattern that has no automaton, only the starts of special tokens are known to be safe. A stream, which
is read from its beginning, may also be divided where a pre-token is known to end because of the text before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from heapq import merge
from time import monotonic

import numpy as np

from basic.bpe import arrays
from basic.bpe.arrays import Chunk
from basic.bpe.patterns.cuts import last_settled_position, safe_cuts_of
from basic.bpe.patterns.longest_of import longest_of
from basic.bpe.patterns.pattern import GPT2_PATTERN, PATTERNS, Pattern, resolve_pattern
from basic.common.arguments import check_text
from basic.common.errors import InvalidInputError

__all__ = ["PATTERNS", "Pattern", "SpecialTokens", "pretokenize", "pretokenize_stream", "resolve_pattern"]

_SURROGATE = re.compile("[\ud800-\udfff]")

_STREAM_CHARACTERS = 1 << 13  # pre-tokenized at a time; the list of pre-tokens takes about 15 bytes a character
_BATCH_CHARACTERS = 1 << 15  # of joined strings: the cost of a batch is small against that of encoding it
_UNSAFE_CHARACTERS = 1 << 16  # without a safe pair: fewer are not worth the time of the automaton in plain Python
_SEARCH_BYTES = 1 << 12  # read at first in the search for a safe position


class SpecialTokens:
    """Special tokens, checked and prepared for the search.

    Args:
        tokens: strings, in the order of their ids.

    Attributes:
        max_length: the number of characters of the longest, 1 if there are none.
        longest_first_bytes: in UTF-8, sorted by the number of characters.

    Raises:
        TypeError: a special token is not a string, or one string is given instead of a list.
        InvalidInputError: a special token is empty, given twice, or has a lone surrogate.
    """

    def __init__(self, tokens: Iterable[str] | None):
        if isinstance(tokens, str | bytes):
            raise TypeError(f"special_tokens must be a list of strings, got {tokens!r}; write [{tokens!r}]")
        tokens = tuple(tokens or ())
        seen = set()
        for i, token in enumerate(tokens):
            if not isinstance(token, str):
                raise TypeError(f"special token {i} must be a string, got {token!r}")
            if not token:
                raise InvalidInputError(f"special token {i} is empty: it would match everywhere; remove it")
            if token in seen:
                raise InvalidInputError(f"special token {token!r} is given twice; give it once")
            if _SURROGATE.search(token):
                raise InvalidInputError(f"special token {token!r} has a lone surrogate, which has no UTF-8 form")
            seen.add(token)
        self._prepare(tokens)

    @classmethod
    def document_mark(cls, separator: str) -> SpecialTokens:
        """The mark between the documents of JSON lines, as the only special token.

        What looks like a special token inside such a document is text. So a mark that no text contains stands for the
        separator: surrogates, which are the bytes 0xff 0xfe 0xfe ... with errors="surrogateescape". It has as many
        bytes as the separator, so sizes and offsets are those of the text.
        """
        special = cls(())
        special._prepare(("\udcff" + "\udcfe" * (len(separator.encode()) - 1),))
        return special

    def _prepare(self, tokens: tuple[str, ...]) -> None:
        self.tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self.longest_first_bytes = [token.encode(errors="surrogateescape") for token in longest_first]
        self.max_length = max(map(len, tokens), default=1)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds the leftmost special token; if several start at the same position, the longest. Else nothing."""
        return re.compile(longest_of(self.tokens))

    def starts(self, text: str) -> Iterator[int]:
        """Every position where a special token starts, also inside another one."""
        match = self.pattern.search(text)
        while match:
            yield match.start()
            match = self.pattern.search(text, match.start() + 1)


# Surrogates


def replace_surrogates(text: str) -> str:
    """Replace each pair of surrogates by its character, and each lone surrogate, which has no UTF-8 form, by U+FFFD."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def replace_surrogates_in_stream(texts: Iterable[str]) -> Iterator[str]:
    """The same for a text that arrives as a stream of strings, where a string may end inside a pair of surrogates.

    Raises:
        TypeError: an item is not a string.
    """
    first_half = ""  # a high surrogate at the end of a string, the first half of a possible pair
    for text in texts:
        check_text(text)
        text = first_half + text
        first_half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        yield replace_surrogates(text[: len(text) - len(first_half)])
    yield replace_surrogates(first_half)


# Pre-tokens


def pretokenize(
    text: str, special_tokens: SpecialTokens, pattern: Pattern = GPT2_PATTERN
) -> Iterator[tuple[list[str], str | None]]:
    """Split a complete text; yields what `pretokenize_stream` yields, in larger lists."""
    find = pattern.find
    position = 0
    for match in special_tokens.pattern.finditer(text):
        yield find(text[position : match.start()]), match.group()
        position = match.end()
    yield find(text[position:]), None


def pretokenize_stream(
    texts: Iterable[str], special_tokens: SpecialTokens, pattern: Pattern = GPT2_PATTERN
) -> Iterator[tuple[list[str], str | None]]:
    """Split a text that arrives as a stream of strings of any lengths.

    Args:
        texts: the strings, in order, without surrogates (other than a mark between documents).
        special_tokens: no pre-token crosses them.
        pattern: see `divide_stream`.

    Yields:
        A list of consecutive pre-tokens, and the special token after them or None. The lists are short even if the
        strings are long, so memory does not grow with the text.

    Raises:
        InvalidInputError: a pre-token is much longer than any that can be encoded.
    """
    for text in divide_stream(_short_strings(texts, _STREAM_CHARACTERS), special_tokens, pattern):
        yield from pretokenize(text, special_tokens, pattern)


def _short_strings(texts: Iterable[str], most: int) -> Iterator[str]:
    """The same text in strings of at most so many characters."""
    for text in texts:
        for start in range(0, len(text), most):
            yield text[start : start + most]


# Chunks between safe positions


def chunks_of_array(
    data: np.ndarray,
    special_tokens: SpecialTokens,
    chunk_bytes: int,
    pattern: Pattern,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Chunk]:
    """Divide the UTF-8 bytes data[start:stop] into chunks; `start` and `stop` must be safe positions."""

    def read(first: int, length: int) -> bytes:
        return data[first : first + length].tobytes()

    for end in chunk_ends(read, len(data), special_tokens, chunk_bytes, pattern, start=start, stop=stop):
        yield data, start, end
        start = end


def chunks_of_stream(
    texts: Iterable[str], special_tokens: SpecialTokens, chunk_bytes: int, pattern: Pattern
) -> Iterator[Chunk]:
    """Divide a stream of strings into chunks of UTF-8 bytes; marks between documents become bytes that are not UTF-8.

    Args:
        chunk_bytes: about the size of a chunk; of text beyond ASCII it can be several times as large.
    """
    short = _short_strings(texts, chunk_bytes)
    for text in divide_stream(short, special_tokens, pattern, characters=chunk_bytes):
        data = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
        yield data, 0, len(data)


def join_strings(texts: Iterable[str]) -> Iterator[str]:
    """Join short strings of a stream, because each string that is yielded has a cost.

    It reads ahead about as much as it has yielded, up to a limit, and for a millisecond: no slow stream is held back.
    """
    batch: list[str] = []
    size, enough, deadline = 0, 1, 0.0
    for text in texts:
        if not isinstance(text, str):
            yield "".join(batch)
            check_text(text)
        batch.append(text)
        size += len(text)
        if size >= enough or monotonic() >= deadline:
            yield "".join(batch)
            enough = min(2 * max(size, enough), _BATCH_CHARACTERS)
            batch, size, deadline = [], 0, monotonic() + 0.001
    yield "".join(batch)


def divide_stream(
    texts: Iterable[str], special_tokens: SpecialTokens, pattern: Pattern, *, characters: int = 0
) -> Iterator[str]:
    """Divide a stream of strings into parts whose pre-tokens and special tokens are those of the complete text.

    In memory is about one string, and twice the text that is held back: the last pre-token, which may grow, and what
    may begin a special token. If no position is safe, the automaton says where the text may be divided.

    Args:
        pattern: if it has no automaton, the text between two special tokens is held back.
        characters: to wait for before a text is divided.

    Raises:
        InvalidInputError: a pre-token is much longer than any that can be encoded.
    """
    held, size, enough = [], 0, 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size < enough:
            continue
        available = "".join(held)
        stop = _last_known_end(available, special_tokens, pattern)
        if stop > 0:
            yield available[:stop]
        held, size = [available[stop:]], size - stop
        # The held text is searched again with the new text: the total time is linear only if this is as long.
        enough = max(2 * size, characters)
        if size > 2 * arrays.MAX_PRETOKEN_BYTES + special_tokens.max_length and len(pattern.find(held[0])) <= 2:
            raise InvalidInputError(arrays.describe_long_pretoken(held[0][:40]))
    if size:
        yield "".join(held)


def _last_known_end(text: str, special_tokens: SpecialTokens, pattern: Pattern) -> int:
    """The last position where a pre-token or special token is known to end, whatever follows the text; else 0.

    Args:
        text: a pre-token or a special token begins with it.
    """
    cuts = safe_cuts_of(pattern.splits)
    complete = len(text) - special_tokens.max_length + 1  # special tokens that start before it are known
    if cuts is not None:
        stop = cuts.last_position(text, 0, complete)
        if stop > 0 and not _is_inside_special_token(text, stop, special_tokens):
            return stop
    position = 0
    for match in special_tokens.pattern.finditer(text):
        if match.start() >= complete:
            break
        position = match.end()
    if cuts is None or complete <= position:
        return position
    stop = cuts.last_position(text, position, complete)
    return (
        last_settled_position(pattern.splits, text[:complete]) if stop == 0 and complete > _UNSAFE_CHARACTERS else stop
    )


def chunk_ends(
    read: Callable[[int, int], bytes],
    size: int,
    special_tokens: SpecialTokens,
    chunk_bytes: int,
    pattern: Pattern,
    *,
    start: int = 0,
    stop: int | None = None,
    search_bytes: int = _SEARCH_BYTES,
) -> Iterator[int]:
    """Find the byte offsets at which the chunks of a text end, lazily.

    Args:
        read, size, pattern, search_bytes: see `find_safe_position`.
        chunk_bytes: about the size of a chunk; a chunk ends at the first safe position after it.
        start, stop: the range to divide; both are safe positions.
    """
    last, stop = start, size if stop is None else stop
    for position in range(start + chunk_bytes, stop, chunk_bytes):
        if position > last:
            last = find_safe_position(read, position, size, special_tokens, pattern, search_bytes=search_bytes)
            yield last
    if last < stop:
        yield stop


def find_safe_position(
    read: Callable[[int, int], bytes],
    position: int,
    size: int,
    special_tokens: SpecialTokens,
    pattern: Pattern = GPT2_PATTERN,
    *,
    search_bytes: int = _SEARCH_BYTES,
) -> int:
    """Find the first safe position at or after a byte offset; `size` if there is none.

    The result does not depend on the text long before the offset, so any worker can find any boundary by itself.

    Args:
        read: returns the bytes from an offset on, up to a number of bytes.
        search_bytes: read at first; twice as many each time that no safe position is found.
    """
    if not 0 < position < size:
        return min(max(position, 0), size)
    cuts = safe_cuts_of(pattern.splits)
    # Bytes before the offset that matter: those of a special token, and of a character (at most 4).
    begin = max(0, position - max([4, *map(len, special_tokens.longest_first_bytes)]))
    length = position - begin + search_bytes
    while True:
        # Each invalid byte (also of an incomplete character at either end) becomes one surrogate, so that byte offsets
        # can be computed exactly.
        text = read(begin, length).decode(errors="surrogateescape")
        at_end = begin + length >= size
        known = len(text) if at_end else len(text) - special_tokens.max_length - 4
        offset, previous = begin, 0
        between_characters = [] if cuts is None else cuts.positions(text).tolist()
        for index in merge(between_characters, special_tokens.starts(text)):  # some come twice
            if index > known:
                break
            offset += len(text[previous:index].encode(errors="surrogateescape"))
            previous = index
            if offset >= position and not _is_inside_special_token(text, index, special_tokens):
                return offset
        if at_end:
            return size
        length *= 2


def _is_inside_special_token(text: str, index: int, special_tokens: SpecialTokens) -> bool:
    """Whether the text has a special token that starts before `index` and ends after it.

    Which of several overlapping ones is the special token depends on all text before, so each of them counts.
    """
    longest_at = special_tokens.pattern.match
    starts = range(max(0, index - special_tokens.max_length + 1), index)
    return any((match := longest_at(text, start)) and match.end() > index for start in starts)
