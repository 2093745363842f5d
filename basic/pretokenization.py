"""Pre-tokens: the pieces of text inside which byte-pair encoding works, found, streamed, and cut apart.

A text is cut at its special tokens, and what lies between them by the GPT-2 pattern, which leaves nothing out:

    "I've 2 cats.<|endoftext|>"  ->  ["I", "'ve", " 2", " cats", "."], "<|endoftext|>"

No special token and no pre-token looks further ahead than a few characters. So a text can be cut in pieces and
streamed (`pretokenize_stream`), and a file in ranges that are worked on in parallel (`find_safe_position`), with the same result
as in one go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import chain

import numpy as np
import regex

from basic.bpe import arrays
from basic.bpe.arrays import Chunk

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

PATTERNS = {
    "gpt2": (
        r"'(?:[sdmt]|ll|ve|re)"  # the end of a contraction
        r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"  # a run of letters, of digits, of other signs, with a space before it
        r"|\s+(?!\S)|\s+"  # white space, which leaves its last character to the run after it
    ),
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

# What others write for the same.
_SPELLINGS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ): "cl100k",
}


def pattern_text(pattern: str) -> str:
    """The pattern that goes by a name, our spelling of a known pattern, and any other pattern as it is."""
    return PATTERNS.get(_SPELLINGS.get(pattern, pattern), pattern)


def pattern_name(pattern: str) -> str | None:
    """The name of a pattern, None where it has none."""
    return next((name for name, known in PATTERNS.items() if known == pattern_text(pattern)), None)


def chunks_of_array(
    data: np.ndarray, special_tokens: SpecialTokens, chunk_bytes: int, start: int = 0, stop: int | None = None
) -> Iterator[Chunk]:
    """An array of text in chunks that begin and end at safe places, as its part must."""
    ends = chunk_ends(partial(_bytes_of, data), len(data), special_tokens, chunk_bytes, start=start, stop=stop)
    for end in ends:
        yield data, start, end
        start = end


def _bytes_of(data: np.ndarray, start: int, length: int) -> bytes:
    return data[start : start + length].tobytes()


GPT2_PATTERN = regex.compile(PATTERNS["gpt2"])

# Here a pre-token ends, whatever comes before or after: none holds white space after another character. Not one
# alternative looks back, so the pattern goes on from here as it would from the beginning of a text.
_SAFE_CUT = r"(?<=\S)(?=\s)"

_SURROGATE = re.compile("[\ud800-\udfff]")

_PIECE_CHARACTERS = 1 << 13  # pre-tokenised at a time: their list takes some fifteen bytes a character
_SEARCH_BYTES = 1 << 12  # read at first to find a place to cut


class SpecialTokens:
    """Special tokens, checked and ready for the search.

    Args:
        tokens: strings, in the order in which they get their ids.

    Attributes:
        tokens: the same, as a tuple.
        pattern: finds the leftmost special token, of several at a place the longest; nothing where there are none.
        max_length: characters of the longest, 1 where there are none.
        longest_first_bytes: as UTF-8, those of more characters first.

    Raises:
        TypeError: a special token is not a string, or one string is given instead of a list.
        ValueError: a special token is empty, given twice, or has no UTF-8 form.
    """

    def __init__(self, tokens: Iterable[str] | None):
        if isinstance(tokens, str | bytes):
            raise TypeError(f"special_tokens must be a list of strings, got {tokens!r}; write [{tokens!r}]")
        self.tokens = tuple(tokens or ())
        seen = set()
        for i, token in enumerate(self.tokens):
            if not isinstance(token, str):
                raise TypeError(f"special token {i} must be a string, got {token!r}")
            if not token:
                raise ValueError(f"special token {i} is empty: it would match everywhere; remove it")
            if token in seen:
                raise ValueError(f"special token {token!r} is given twice; give it once")
            if _SURROGATE.search(token):
                raise ValueError(f"special token {token!r} has a lone surrogate, which has no UTF-8 form")
            seen.add(token)
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.longest_first_bytes = [token.encode() for token in longest_first]
        self.max_length = max(map(len, self.tokens), default=1)


def without_surrogates(pieces: Iterable[str]) -> Iterator[str]:
    """The same text with a character for each pair of surrogates, also a pair cut in two, and U+FFFD for a lone one.

    Raises:
        TypeError: a piece is not a string.
    """
    cut = ""  # the first half of what may be a pair
    for piece in pieces:
        if not isinstance(piece, str):
            raise TypeError(f"text must be a string, got {type(piece).__name__}: {piece!r:.80}")
        piece = cut + piece
        cut = piece[-1:] if "\ud800" <= piece[-1:] <= "\udbff" else ""
        yield _repaired(piece[: len(piece) - len(cut)])
    yield _repaired(cut)


def _repaired(text: str) -> str:
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def compile_pattern(pattern: str | None) -> re.Pattern[str]:
    """The pattern to find pre-tokens with, GPT-2's by default; a name stands for a published one (`PATTERNS`).

    Raises:
        TypeError: it is not a string.
        ValueError: it is not in the syntax of the `regex` package.
    """
    if pattern is None:
        return GPT2_PATTERN
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string in the syntax of the regex package, got {pattern!r}")
    pattern = pattern_text(pattern)
    if pattern == GPT2_PATTERN.pattern:
        return GPT2_PATTERN
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not in the syntax of the regex package: {error}") from None


def pretokenize(
    text: str, special_tokens: SpecialTokens, pattern: re.Pattern[str] | None = None
) -> Iterator[tuple[list[str], str | None]]:
    """Pre-tokenise a text that is there as a whole; what `pretokenize_stream` yields of it, joined, in larger batches."""
    find = _finder(pattern)
    position = 0
    for match in special_tokens.pattern.finditer(text):
        yield find(text[position : match.start()]), match.group()
        position = match.end()
    yield find(text[position:]), None


def _finder(pattern: re.Pattern[str] | None) -> Callable[[str], list[str]]:
    """What finds all pre-tokens of a text between two special tokens."""
    return GPT2_PATTERN.findall if pattern in (None, GPT2_PATTERN) else partial(_all_parts, pattern)


def pretokenize_stream(
    pieces: Iterable[str], special_tokens: SpecialTokens, pattern: re.Pattern[str] | None = None
) -> Iterator[tuple[list[str], str | None]]:
    """Pre-tokenise a text that comes in pieces, wherever they are cut.

    What is not yet certain is held back: a special token may begin in the last `max_length - 1` characters, and
    the last two pre-tokens before them may still change (one grows; of two, "'" and "l" become "'ll").

    Args:
        pieces: the text, valid Unicode without surrogates.
        special_tokens: hard boundaries.
        pattern: another than GPT-2's. It may look as far as it likes, so that the text between two special tokens is
            held as a whole; what it leaves out becomes pre-tokens too.

    Yields:
        Some pre-tokens, in order, and the special token after them or None. The batches are small whatever the
        pieces are, so that a list of all pre-tokens never exists.
    """
    own, find = pattern in (None, GPT2_PATTERN), _finder(pattern)
    held, new, new_length = "", [], 0
    for piece in chain(_short(pieces), [None]):
        if piece is not None:
            new.append(piece)
            new_length += len(piece)
            # What is held is scanned again with what is new: waiting for as much of this makes the whole linear.
            if new_length <= len(held):
                continue
        text = held + "".join(new)
        certain = len(text) if piece is None else len(text) - special_tokens.max_length + 1
        position = 0
        for match in special_tokens.pattern.finditer(text):
            if match.start() >= certain:
                break
            yield find(text[position : match.start()]), match.group()
            position = match.end()
        if not own and piece is not None:
            held, new, new_length = text[position:], [], 0
            continue
        stop = max(position, certain)
        pretokens = find(text[position:stop])
        num_final = len(pretokens) if piece is None else max(0, len(pretokens) - 2)
        yield pretokens[:num_final], None
        held, new, new_length = text[stop - sum(map(len, pretokens[num_final:])) :], [], 0


def _all_parts(pattern: re.Pattern[str], text: str) -> list[str]:
    """What the pattern finds and what lies between, so that joined together they are the text."""
    parts, position = [], 0
    for match in pattern.finditer(text):
        start, stop = match.span()
        parts += [part for part in (text[position:start], text[start:stop]) if part]
        position = stop
    return [*parts, text[position:]] if position < len(text) else parts


def _short(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of at most `_PIECE_CHARACTERS`."""
    for piece in pieces:
        for start in range(0, len(piece), _PIECE_CHARACTERS):
            yield piece[start : start + _PIECE_CHARACTERS]


def chunk_ends(
    read: Callable[[int, int], bytes],
    size: int,
    special_tokens: SpecialTokens,
    chunk_bytes: int,
    pattern: re.Pattern[str] = GPT2_PATTERN,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """The ends of chunks of a text, one after the other as they are asked for.

    Args:
        read: gives the bytes from an offset on, as many as there are of a length.
        size: of the text in bytes.
        pattern: of another than GPT-2's nothing is known; only special tokens are safe places then.
        start, stop: the part of the text to cut, itself between safe places.
    """
    last, stop = start, size if stop is None else stop
    for position in range(start + chunk_bytes, stop, chunk_bytes):
        if position > last:
            last = find_safe_position(read, position, size, special_tokens, pattern)
            yield last
    if last < stop:
        yield stop


def chunks_of_stream(
    pieces: Iterable[str],
    special_tokens: SpecialTokens,
    chunk_bytes: int,
    pattern: re.Pattern[str] = GPT2_PATTERN,
) -> Iterator[arrays.Chunk]:
    """A text that comes in pieces, in chunks that begin and end at safe places, as UTF-8.

    In memory are two chunks, or as much as there is up to the first safe place.
    """
    # A place is known to be safe when all is there that a special token across it, or a character, would have.
    margin = 4 + max([0, *map(len, special_tokens.longest_first_bytes)])
    held, size, enough = [], 0, 2 * chunk_bytes
    for piece in chain(pieces, [None]):
        if piece is not None:
            held.append(piece.encode())
            size += len(held[-1])
            if size < enough:
                continue
        text = b"".join(held)
        data = np.frombuffer(text, np.uint8)
        start = 0
        read = partial(_slice, text)
        for stop in chunk_ends(read, size, special_tokens, chunk_bytes, pattern):
            if stop + margin <= size or piece is None:
                yield data, start, stop
                start = stop
        held, size = [text[start:]], size - start
        enough = 2 * max(size, chunk_bytes)


def _slice(text: bytes, start: int, length: int) -> bytes:
    return text[start : start + length]


def find_safe_position(
    read: Callable[[int, int], bytes],
    position: int,
    size: int,
    special_tokens: SpecialTokens,
    pattern: re.Pattern[str] = GPT2_PATTERN,
) -> int:
    """The first safe place at or after a byte offset, at the latest the end of the file.

    A safe place is the beginning of a special token, or white space after another character, unless it lies
    within what could be a special token: which of several overlapping ones is meant depends on all before it.
    So each is found without the ones before it, by whoever wants it.
    """
    if not 0 < position < size:
        return min(max(position, 0), size)
    candidate = _candidate(special_tokens.pattern.pattern, pattern is GPT2_PATTERN)
    # Seen before the offset: a whole special token and a whole character (of at most 4 bytes).
    begin = max(0, position - max([4, *map(len, special_tokens.longest_first_bytes)]))
    length = position - begin + _SEARCH_BYTES
    while True:
        # Invalid bytes, such as those of a character cut by the window, become one surrogate each, so that the
        # way back to byte offsets is exact.
        text = read(begin, length).decode(errors="surrogateescape")
        at_end = begin + length >= size
        offset, previous = begin, 0
        for match in candidate.finditer(text):
            here = match.start()
            if not at_end and here + special_tokens.max_length + 4 > len(text):
                break
            offset += len(text[previous:here].encode(errors="surrogateescape"))
            previous = here
            if offset >= position and not _within_special_token(text, here, special_tokens):
                return offset
        if at_end:
            return size
        length *= 2


@cache
def _candidate(special_tokens: str, own: bool) -> re.Pattern[str]:
    """Finds places that may be safe."""
    return regex.compile(f"{_SAFE_CUT if own else '(?!)'}|(?={special_tokens})")


def _within_special_token(text: str, here: int, special_tokens: SpecialTokens) -> bool:
    """Whether any special token stands in the text so that it begins before `here` and ends after it."""
    return any(token in text[max(0, here - len(token) + 1) : here + len(token) - 1] for token in special_tokens.tokens)
