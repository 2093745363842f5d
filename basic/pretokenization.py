"""Pre-tokens: the pieces of text inside which byte-pair encoding works, found, streamed and counted.

A text is cut at its special tokens, and what lies between them by the GPT-2 pattern, which leaves nothing out:

    "I've 2 cats.<|endoftext|>"  ->  ["I", "'ve", " 2", " cats", "."], "<|endoftext|>"

No special token and no pre-token looks further ahead than a few characters. So a text can be cut in pieces and
streamed (`pretoken_batches`), and a file in ranges that are counted in parallel (`count_pretokens`), with the
same result as in one go.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, pairwise, repeat

import numpy as np
import regex

from basic import bpe_kernels
from basic.bpe_kernels import Words
from basic.bytes_utils import decode_blocks, file_size_bytes, map_bytes, progress_bar, read_blocks, utf8_error
from basic.patterns import PATTERNS, spelled_out
from basic.text_sources import TextSource, check_separator, read_text, text_source

GPT2_PATTERN = regex.compile(PATTERNS["gpt2"])

# Here a pre-token ends, whatever comes before or after: none holds white space after another character. Not one
# alternative looks back, so the pattern goes on from here as it would from the beginning of a text.
_SAFE_CUT = r"(?<=\S)(?=\s)"

_SURROGATE = re.compile("[\ud800-\udfff]")

_PIECE_CHARACTERS = 1 << 13  # pre-tokenised at a time: their list takes some fifteen bytes a character
_SEARCH_BYTES = 1 << 12  # read at first to find a place to cut
_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 1 << 20, 1 << 24
_MIN_CHUNKS_FOR_PROCESSES = 4
KERNEL_CHUNK_BYTES = 1 << 22

FileChunk = tuple[str | os.PathLike, int, int]  # path, start, stop


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
    """The pattern to find pre-tokens with, GPT-2's by default; a name stands for a published one (`basic.patterns`).

    Raises:
        TypeError: it is not a string.
        ValueError: it is not in the syntax of the `regex` package.
    """
    if pattern is None:
        return GPT2_PATTERN
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string in the syntax of the regex package, got {pattern!r}")
    pattern = spelled_out(pattern)
    if pattern == GPT2_PATTERN.pattern:
        return GPT2_PATTERN
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not in the syntax of the regex package: {error}") from None


def pretokens_of(
    text: str, special_tokens: SpecialTokens, pattern: re.Pattern[str] | None = None
) -> Iterator[tuple[list[str], str | None]]:
    """Pre-tokenise a text that is there as a whole; what `pretoken_batches` yields of it, joined, in larger batches."""
    find = _finder(pattern)
    position = 0
    for match in special_tokens.pattern.finditer(text):
        yield find(text[position : match.start()]), match.group()
        position = match.end()
    yield find(text[position:]), None


def _finder(pattern: re.Pattern[str] | None) -> Callable[[str], list[str]]:
    """What finds all pre-tokens of a text between two special tokens."""
    return GPT2_PATTERN.findall if pattern in (None, GPT2_PATTERN) else partial(_all_parts, pattern)


def pretoken_batches(
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


def count_pretokens(
    input_path: str | os.PathLike | Sequence[str | os.PathLike],
    special_tokens: SpecialTokens,
    *,
    pattern: str | None = None,
    num_workers: int | None = None,
    chunk_bytes: int | None = None,
    kernels: bool | None = None,
    progress: bool = False,
) -> Counter[bytes]:
    """Count the pre-tokens of a file, in parallel where it is large enough to be worth it.

    Args:
        input_path: a text file in UTF-8, plain or of those of `basic.text_sources`, or several; no pre-token goes from
            one file to the next.
        special_tokens: hard boundaries, which are not counted themselves.
        pattern: another than GPT-2's, in the syntax of the `regex` package.
        num_workers: threads or processes, at least 1; by default one for each processor that this process may use.
        chunk_bytes: about how much of the file is one task, at least 1; chosen by default. The result is the
            same for any value.
        kernels: whether to count with compiled code; by default where the text is large.
        progress: whether to show a progress bar.

    Returns:
        How often each pre-token, as UTF-8, is there.

    Raises:
        ValueError: the file is not UTF-8 (the byte offset is named), or a number is too small.
        OSError: the file cannot be read.
    """
    counted = count_words(
        input_path,
        special_tokens,
        pattern=pattern,
        num_workers=num_workers,
        chunk_bytes=chunk_bytes,
        kernels=kernels,
        progress=progress,
    )
    return counted if isinstance(counted, Counter) else counted.counter()


def count_words(
    input_path: str | os.PathLike | Sequence[str | os.PathLike],
    special_tokens: SpecialTokens,
    *,
    pattern: str | None = None,
    num_workers: int | None = None,
    chunk_bytes: int | None = None,
    kernels: bool | None = None,
    progress: bool = False,
) -> Counter[bytes] | Words:
    """The same, but what the kernels have counted stays in arrays."""
    paths = [text_source(path) for path in ([input_path] if isinstance(input_path, str | os.PathLike) else input_path)]
    for path in paths:
        check_separator(path, special_tokens.tokens)
    if num_workers is None:
        num_workers = default_num_workers()
    compiled = compile_pattern(pattern)
    sizes = [file_size_bytes(path) for path in paths]
    size = sum(sizes)
    kernels = (
        compiled is GPT2_PATTERN
        and kernels is not False
        and (bool(kernels) or bpe_kernels.worth_it("training", size, num_mapped_bytes=size))
    )
    if chunk_bytes is None:
        # Enough chunks that nobody waits long for the last one, large enough to repeat few words; the kernels find
        # the special tokens of a chunk, then its words, and the second time it is best still in the cache.
        largest = KERNEL_CHUNK_BYTES if kernels else _MAX_CHUNK_BYTES
        chunk_bytes = min(max(size // (4 * max(num_workers, 1)), _MIN_CHUNK_BYTES), largest)
    for name, value in [("num_workers", num_workers), ("chunk_bytes", chunk_bytes)]:
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    chunks: list[FileChunk] = [
        (path, start, stop)
        for path in paths
        if path.is_plain
        for start, stop in pairwise(chunk_boundaries(path, special_tokens, chunk_bytes, compiled))
    ]
    streams = [path for path in paths if not path.is_plain]
    # How much text a stream has, nobody knows.
    total = None if streams else size
    with progress_bar(progress, desc="counting", total=total, unit="B", unit_scale=True) as advance:
        if kernels:
            return _count_with_kernels(chunks, streams, chunk_bytes, special_tokens, num_workers, advance)
        counts: Counter[str] = Counter()
        chunk_counts = _count_chunks(chunks, special_tokens, pattern, num_workers)
        for (_, start, stop), counted in zip(chunks, chunk_counts, strict=True):
            counts.update(counted)
            advance(stop - start)
        for piece_counts in _count_streams(streams, special_tokens, compiled, advance):
            counts.update(piece_counts)
    return Counter({pretoken.encode(): count for pretoken, count in counts.items()})


def _count_with_kernels(
    chunks: list[FileChunk],
    streams: list[TextSource],
    chunk_bytes: int,
    special_tokens: SpecialTokens,
    num_threads: int,
    advance: Callable[[int], object],
) -> Words:
    arrays = {path: map_bytes(path) for path, _, _ in chunks}
    mapped = ((arrays[path], start, stop) for path, start, stop in chunks)
    streamed = (stream_chunks(read_text(stream), special_tokens, chunk_bytes) for stream in streams)
    done = 0

    def count_done(num_bytes: int) -> None:
        nonlocal done
        done += 1
        advance(num_bytes)

    try:
        return bpe_kernels.count_words(
            chain(mapped, chain.from_iterable(streamed)),
            special_tokens.longest_first_bytes,
            num_threads,
            count_done,
        )
    except bpe_kernels.InvalidByteError as error:  # of a mapped file: a stream is UTF-8 when it arrives
        path = chunks[done][0]
        raise invalid_byte(path, arrays[path], error.place) from None


def invalid_byte(name: str | os.PathLike, data: np.ndarray, place: int) -> ValueError:
    """What to raise for a byte of an array that is not UTF-8."""
    try:
        data[place : place + 4].tobytes().decode()
    except UnicodeDecodeError as error:
        return utf8_error(name, place, int(data[place]), error.reason)
    raise AssertionError(f"the bytes at {place} are UTF-8")


def default_num_workers() -> int:
    """The processors this process may use, which in a container can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count_chunks(
    chunks: list[FileChunk], special_tokens: SpecialTokens, pattern: str | None, num_workers: int
) -> Iterator[Counter[str]]:
    """The counts of each chunk, in order."""
    arguments = (chunks, repeat(special_tokens), repeat(pattern))
    if num_workers == 1 or len(chunks) < _MIN_CHUNKS_FOR_PROCESSES:
        yield from map(_count_chunk, *arguments)
        return
    # Not multiprocessing.Pool, which waits for ever for a worker that the system has killed.
    with ProcessPoolExecutor(min(num_workers, len(chunks))) as executor:
        yield from executor.map(_count_chunk, *arguments)


def _count_chunk(chunk: FileChunk, special_tokens: SpecialTokens, pattern: str | None) -> Counter[str]:
    path, start, stop = chunk
    counts: Counter[str] = Counter()
    text = decode_blocks(read_blocks(path, start, stop), path, start)
    for pretokens, _ in pretoken_batches(text, special_tokens, compile_pattern(pattern)):
        counts.update(pretokens)
    return counts


def _count_streams(
    streams: list[TextSource],
    special_tokens: SpecialTokens,
    pattern: re.Pattern[str],
    advance: Callable[[int], object],
) -> Iterator[list[str]]:
    """The pre-tokens of each stream, some at a time."""
    for stream in streams:
        for pretokens, _ in pretoken_batches(read_text(stream), special_tokens, pattern):
            yield pretokens
            advance(sum(map(len, pretokens)))


def chunk_boundaries(
    path: str | os.PathLike,
    special_tokens: SpecialTokens,
    chunk_bytes: int,
    pattern: re.Pattern[str] = GPT2_PATTERN,
) -> list[int]:
    """Byte offsets at which a file can be cut without changing its pre-tokens.

    Returns:
        0, the first safe place from each multiple of `chunk_bytes` on, and the size of the file.
    """
    with open(path, "rb") as file:

        def read(start: int, length: int) -> bytes:
            file.seek(start)
            return file.read(length)

        return [0, *safe_cuts(read, file_size_bytes(path), special_tokens, chunk_bytes, pattern)]


def safe_cuts(
    read: Callable[[int, int], bytes],
    size: int,
    special_tokens: SpecialTokens,
    chunk_bytes: int,
    pattern: re.Pattern[str] = GPT2_PATTERN,
) -> Iterator[int]:
    """The ends of chunks of a text, one after the other as they are asked for.

    Args:
        read: gives the bytes from an offset on, as many as there are of a length.
        size: of the text in bytes.
        pattern: of another than GPT-2's nothing is known; only special tokens are safe places then.
    """
    safe = _SAFE_CUT if pattern is GPT2_PATTERN else "(?!)"
    candidate = regex.compile(f"{safe}|(?={special_tokens.pattern.pattern})")
    last = 0
    for position in range(chunk_bytes, size, chunk_bytes):
        if position > last:
            last = _safe_cut_from(read, position, size, special_tokens, candidate)
            yield last
    if last < size:
        yield size


def stream_chunks(
    pieces: Iterable[str],
    special_tokens: SpecialTokens,
    chunk_bytes: int,
    pattern: re.Pattern[str] = GPT2_PATTERN,
) -> Iterator[bpe_kernels.Chunk]:
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
        for stop in safe_cuts(read, size, special_tokens, chunk_bytes, pattern):
            if stop + margin <= size or piece is None:
                yield data, start, stop
                start = stop
        held, size = [text[start:]], size - start
        enough = 2 * max(size, chunk_bytes)


def _slice(text: bytes, start: int, length: int) -> bytes:
    return text[start : start + length]


def _safe_cut_from(
    read: Callable[[int, int], bytes],
    position: int,
    size: int,
    special_tokens: SpecialTokens,
    candidate: re.Pattern[str],
) -> int:
    """The first safe place at or after a byte offset, at the latest the end of the file.

    A safe place is the beginning of a special token, or white space after another character, unless it lies
    within what could be a special token: which of several overlapping ones is meant depends on all before it.
    """
    # Seen before the offset: a whole special token and a whole character (of at most 4 bytes).
    begin = max(0, position - max([4, *(len(token.encode()) for token in special_tokens.tokens)]))
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


def _within_special_token(text: str, here: int, special_tokens: SpecialTokens) -> bool:
    """Whether any special token stands in the text so that it begins before `here` and ends after it."""
    return any(token in text[max(0, here - len(token) + 1) : here + len(token) - 1] for token in special_tokens.tokens)
