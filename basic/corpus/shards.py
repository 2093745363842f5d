"""A corpus in shards: parts of bounded size, each of which can be worked on anywhere, apart from the others.

    inputs  --sources_of-->  files  --cut-->  shards  --chunks_of, text_of-->  text, cut at safe places

A plain file is cut into ranges of bytes. Where exactly, each worker finds for itself: the first safe place at or after
the end of one range is where the next begins (`basic.pretokenization.find_safe_position`), so that cutting a corpus takes no
look into it, and what travels to a worker is a name and two numbers. A compressed file or one of JSON lines can be
read only from its beginning: it is one shard, however large, streamed in memory that does not grow with it. Many such
files of some hundred megabytes are therefore better than one of a hundred gigabytes. Small inputs share a shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from basic.bpe.arrays import Chunk, InvalidByteError
from basic.bytes_utils import decode_blocks, invalid_byte_error
from basic.corpus.sources import TextSource, map_bytes, read_text
from basic.pretokenization import GPT2_PATTERN, SpecialTokens, chunks_of_array, chunks_of_stream, find_safe_position

T = TypeVar("T")

# By default: large enough that starting a shard and saving what it gives cost little, small enough that little is lost
# with a worker.
SHARD_BYTES = 1 << 27
# What kernels get at a time: they find the special tokens of a chunk, then its words, and the second time it is best
# still in the cache.
KERNEL_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Piece:
    """A part of one input.

    Attributes:
        source: the input.
        size: of the file in bytes; None where the server does not tell.
        mark: changes with the content of the file.
        start, stop: of a plain file the bytes between the first safe places from these offsets on; `stop` is None
            where all of the file is meant and can only be streamed.
    """

    source: TextSource
    size: int | None
    mark: str
    start: int = 0
    stop: int | None = None

    @property
    def num_bytes(self) -> int:
        """About how much there is to do."""
        return (self.size or 0) if self.stop is None else self.stop - self.start

    @property
    def is_mapped(self) -> bool:
        return self.stop is not None and not self.source.is_remote


Shard = tuple[Piece, ...]


def whole(source: TextSource) -> Piece:
    """All of an input.

    Raises:
        OSError: it is no file that can be read.
    """
    size, mark = source.state()
    if not source.is_remote:
        # A worker may have another current folder.
        source = replace(source, path=os.path.abspath(source.path))
    return Piece(source, size, mark, 0, size if source.is_plain and source.gives_parts() else None)


def known_bytes(pieces: Sequence[Piece]) -> int | None:
    """How much text there is, for a progress bar; None where there is a stream: nobody knows how much text it has."""
    return sum(piece.num_bytes for piece in pieces) if all(piece.source.is_plain for piece in pieces) else None


def fingerprint_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """What says whether inputs, given whole, are the same: names, sizes, times of change, and how JSON is read."""
    digest = hashlib.sha256()
    for piece in pieces:
        source = piece.source
        state = [os.fspath(source), piece.size, piece.mark, source.field, source.end_of_text]
        digest.update(json.dumps(state).encode())
    num_bytes = sum(piece.size or 0 for piece in pieces)
    return {"inputs": len(pieces), "input_bytes": num_bytes, "input_sha256": digest.hexdigest()}


def cut(pieces: Iterable[Piece], shard_bytes: int) -> list[Shard]:
    """The shards of inputs, in order: each of about `shard_bytes`, but for a stream that is longer."""
    shards: list[Shard] = []
    last: list[Piece] = []
    for piece in pieces:
        if piece.stop is None or piece.num_bytes <= shard_bytes:
            parts = [piece]
        else:
            bounds = [*range(piece.start, piece.stop, shard_bytes), piece.stop]
            parts = [replace(piece, start=start, stop=stop) for start, stop in pairwise(bounds)]
        for part in parts:
            if last and part.num_bytes + sum(each.num_bytes for each in last) > shard_bytes:
                shards.append(tuple(last))
                last = []
            last.append(part)
    return [*shards, tuple(last)] if last else shards


def text_of(
    piece: Piece,
    special_tokens: SpecialTokens,
    pattern: re.Pattern[str] = GPT2_PATTERN,
    *,
    errors: str = "strict",
    read: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[str]:
    """The text of a piece, wherever it is cut; see `basic.corpus.sources.read_text`. `read` is told its bytes."""

    def told(parts: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
        for part in parts:
            read(size(part))
            yield part

    if piece.stop is None:
        return told(read_text(piece.source, errors=errors), lambda text: len(text.encode()))
    start, stop = _safe_range(piece, special_tokens, pattern)
    return decode_blocks(told(piece.source.blocks(start, stop), len), piece.source, start, errors=errors)


def _safe_range(piece: Piece, special_tokens: SpecialTokens, pattern: re.Pattern[str]) -> tuple[int, int]:
    size, read = piece.size or 0, piece.source.read
    start, stop = (
        find_safe_position(read, place, size, special_tokens, pattern) for place in (piece.start, piece.stop or 0)
    )
    return start, stop


class ShardChunks:
    """The text of a shard for the kernels: an iterator over chunks that begin and end at safe places.

    It remembers where each chunk comes from until `done` is called for it, so that an error can say it.
    """

    def __init__(self, shard: Sequence[Piece], special_tokens: SpecialTokens, *, errors: str = "strict") -> None:
        self._shard, self._special_tokens, self._errors = shard, special_tokens, errors
        self._places: deque[tuple[TextSource, np.ndarray, int]] = deque()

    def __iter__(self) -> Iterator[Chunk]:
        for piece in self._shard:
            for offset, chunk in self._mapped(piece) if piece.is_mapped else self._streamed(piece):
                self._places.append((piece.source, chunk[0], offset))
                yield chunk

    def done(self) -> None:
        """The first chunk of those taken and not yet done is done."""
        self._places.popleft()

    def explain(self, error: InvalidByteError) -> ValueError:
        """What to raise for a byte of the first chunk that is not yet done: it names the input and the offset there."""
        source, data, offset = self._places[0]
        return invalid_byte_error(source, data, error.offset, offset + error.offset, lacks_token=error.lacks_token)

    def _mapped(self, piece: Piece) -> Iterator[tuple[int, Chunk]]:
        """Chunks, and where their arrays begin in the input."""
        data = map_bytes(piece.source)
        if len(data) != piece.size:
            raise ValueError(
                f"{os.fspath(piece.source)!r} has {len(data)} bytes, a moment ago it had {piece.size}: it must not "
                "change while it is read"
            )
        start, stop = _safe_range(piece, self._special_tokens, GPT2_PATTERN)
        for chunk in chunks_of_array(data, self._special_tokens, KERNEL_CHUNK_BYTES, start, stop):
            yield 0, chunk

    def _streamed(self, piece: Piece) -> Iterator[tuple[int, Chunk]]:
        special = self._special_tokens
        offset = 0 if piece.stop is None else _safe_range(piece, special, GPT2_PATTERN)[0]
        for data, start, stop in chunks_of_stream(
            text_of(piece, special, errors=self._errors), special, KERNEL_CHUNK_BYTES
        ):
            yield offset - start, (data, start, stop)
            offset += stop - start
