"""A corpus in shards of bounded size, each of which any worker can process on its own.

    inputs --expand_inputs--> sources --entire_source--> ranges --split_into_shards--> shards
    shard --read_range, ShardChunks--> text

A plain file is split into ranges of bytes. Each worker finds the exact ends: a range begins at the first safe position
at or after its start (`basic.pretokenization.find_safe_position`) and ends where the next range begins. So splitting
does not read the corpus, and a task for a worker is only a file name and two numbers. A compressed file, or one of JSON
lines, can only be read from its beginning: it is always one shard, streamed in bounded memory. Many compressed files of
some hundred megabytes are therefore better than one of a hundred gigabytes. Small inputs share a shard.
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
from basic.common.errors import InvalidInputError
from basic.corpus.sources import TextSource, map_bytes, read_text
from basic.pretokenization import GPT2_PATTERN, SpecialTokens, chunks_of_array, chunks_of_stream, find_safe_position

T = TypeVar("T")

# The default: so large that starting a task and saving its result cost little, so small that little work is lost with a
# worker.
SHARD_BYTES = 1 << 27
# A kernel scans a chunk for special tokens, then for pre-tokens: the second time the chunk should be in the cache.
KERNEL_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class SourceRange:
    """A range of bytes of a plain file, or any other source as a whole.

    Attributes:
        source: the input.
        size: size of the file in bytes; None if the server does not report it.
        version: changes when the content of the file changes.
        start, stop: byte offsets in a plain file; the range is from the first safe position at or after `start` to that
            at or after `stop`. `stop` is None for a source that can only be streamed as a whole.
    """

    source: TextSource
    size: int | None
    version: str
    start: int = 0
    stop: int | None = None

    @property
    def num_bytes(self) -> int:
        """The approximate number of bytes to read."""
        return (self.size or 0) if self.stop is None else self.stop - self.start

    @property
    def is_mapped(self) -> bool:
        """Whether the range is read through a memory map."""
        return self.stop is not None and not self.source.is_remote


Shard = tuple[SourceRange, ...]


def entire_source(source: TextSource) -> SourceRange:
    """Return the range that covers all of a source.

    Raises:
        OSError: the source is not a readable file.
    """
    size, version = source.size_and_version()
    if not source.is_remote:
        # A worker may have another current folder.
        source = replace(source, path=os.path.abspath(source.path))
    return SourceRange(source, size, version, 0, size if source.is_plain and source.supports_ranges() else None)


def total_text_bytes(ranges: Sequence[SourceRange]) -> int | None:
    """Return the size of the text for a progress bar, or None if a source must be decompressed or parsed to know it."""
    return sum(part.num_bytes for part in ranges) if all(part.source.is_plain for part in ranges) else None


def inputs_fingerprint(ranges: Sequence[SourceRange]) -> dict[str, Any]:
    """Return what identifies entire inputs in a work folder: names, sizes, versions, and how JSON lines are read."""
    digest = hashlib.sha256()
    for part in ranges:
        source = part.source
        state = [os.fspath(source), part.size, part.version, source.field, source.end_of_text]
        digest.update(json.dumps(state).encode())
    num_bytes = sum(part.size or 0 for part in ranges)
    return {"inputs": len(ranges), "input_bytes": num_bytes, "input_sha256": digest.hexdigest()}


def split_into_shards(ranges: Iterable[SourceRange], shard_bytes: int) -> list[Shard]:
    """Split inputs into shards of about `shard_bytes`, in order; a source that is streamed may make a larger one."""
    shards: list[Shard] = []
    shard: list[SourceRange] = []
    for source_range in ranges:
        start, stop = source_range.start, source_range.stop
        if stop is None or source_range.num_bytes <= shard_bytes:
            parts = [source_range]
        else:
            ends = pairwise([*range(start, stop, shard_bytes), stop])
            parts = [replace(source_range, start=start, stop=stop) for start, stop in ends]
        for part in parts:
            if shard and part.num_bytes + sum(each.num_bytes for each in shard) > shard_bytes:
                shards.append(tuple(shard))
                shard = []
            shard.append(part)
    return [*shards, tuple(shard)] if shard else shards


def read_range(
    source_range: SourceRange,
    special_tokens: SpecialTokens,
    pattern: re.Pattern[str] = GPT2_PATTERN,
    *,
    errors: str = "strict",
    on_read: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[str]:
    """Stream the text of a range; the strings may end anywhere. See `basic.corpus.sources.read_text`.

    Args:
        special_tokens, pattern: decide which positions are safe.
        on_read: called with the number of bytes of each block before it is decoded.
    """

    def counted(blocks: Iterable[T], num_bytes: Callable[[T], int]) -> Iterator[T]:
        for block in blocks:
            on_read(num_bytes(block))
            yield block

    source = source_range.source
    if source_range.stop is None:
        return counted(read_text(source, errors=errors), lambda text: len(text.encode()))
    start, stop = _safe_range(source_range, special_tokens, pattern)
    return decode_blocks(counted(source.blocks(start, stop), len), source, start, errors=errors)


def _safe_range(
    source_range: SourceRange, special_tokens: SpecialTokens, pattern: re.Pattern[str] = GPT2_PATTERN
) -> tuple[int, int]:
    read, size = source_range.source.read, source_range.size or 0
    start, stop = (
        find_safe_position(read, offset, size, special_tokens, pattern)
        for offset in (source_range.start, source_range.stop or 0)
    )
    return start, stop


class ShardChunks:
    """The text of a shard in chunks for the kernels; a chunk begins and ends at safe positions.

    It keeps the origin of each chunk until `mark_done` is called, for error messages.

    Args:
        errors: for bytes that are not UTF-8 in a stream: "strict" or "replace". Mapped bytes are not decoded here.
        chunk_bytes: the approximate size of a chunk.
    """

    def __init__(
        self,
        shard: Sequence[SourceRange],
        special_tokens: SpecialTokens,
        *,
        errors: str = "strict",
        chunk_bytes: int = KERNEL_CHUNK_BYTES,
    ) -> None:
        self._shard, self._special_tokens = shard, special_tokens
        self._errors, self._chunk_bytes = errors, chunk_bytes
        # Of each chunk: its source, its array, and the array's offset in the source.
        self._unfinished: deque[tuple[TextSource, np.ndarray, int]] = deque()

    def __iter__(self) -> Iterator[Chunk]:
        for part in self._shard:
            for offset, chunk in self._mapped(part) if part.is_mapped else self._streamed(part):
                self._unfinished.append((part.source, chunk[0], offset))
                yield chunk

    def mark_done(self) -> None:
        """Forget the origin of the first unfinished chunk."""
        self._unfinished.popleft()

    def describe_error(self, error: InvalidByteError) -> ValueError:
        """Return the error to raise for a wrong byte in the first unfinished chunk: it names the input and offset."""
        source, data, offset = self._unfinished[0]
        return invalid_byte_error(source, data, error.offset, offset + error.offset, lacks_token=error.lacks_token)

    def _mapped(self, part: SourceRange) -> Iterator[tuple[int, Chunk]]:
        """Chunks, each with the offset of its array in the source."""
        data = map_bytes(part.source)
        if len(data) != part.size:
            raise InvalidInputError(
                f"{os.fspath(part.source)!r} has {len(data)} bytes, but had {part.size} when the work began: a file "
                "must not change while it is read; run again"
            )
        start, stop = _safe_range(part, self._special_tokens)
        for chunk in chunks_of_array(data, self._special_tokens, self._chunk_bytes, start, stop):
            yield 0, chunk

    def _streamed(self, part: SourceRange) -> Iterator[tuple[int, Chunk]]:
        special_tokens = self._special_tokens
        offset = 0 if part.stop is None else _safe_range(part, special_tokens)[0]
        text = read_range(part, special_tokens, errors=self._errors)
        for data, start, stop in chunks_of_stream(text, special_tokens, self._chunk_bytes):
            yield offset - start, (data, start, stop)
            offset += stop - start
