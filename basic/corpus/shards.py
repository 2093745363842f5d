"""A corpus in shards of bounded size, each of which any worker can process on its own.

    inputs --expand_inputs--> sources --entire_source--> segments --split_into_shards--> shards
    shard --read_segment, ShardChunks--> text

A plain file is split into byte ranges. Each worker finds the exact ends: a segment begins at the first safe position
at or after its start (`basic.pretokenization.find_safe_position`) and ends where the next segment begins. So splitting
does not read the corpus, and a task for a worker is only a file name and two numbers. A compressed file, or one of JSON
lines, can only be read from its beginning: it is always one shard, streamed in bounded memory. Many compressed files of
some hundred megabytes are therefore better than one of a hundred gigabytes. Small inputs share a shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby, pairwise
from typing import Any, NamedTuple, TypeVar

from basic.bpe.arrays import Chunk, InvalidByteError
from basic.bpe.loading import MIN_BYTES_FOR_KERNELS
from basic.bpe.patterns.cuts import safe_cuts_of
from basic.bytes_utils import decode_blocks
from basic.common.errors import InvalidInputError
from basic.corpus.files import map_bytes, release_pages, standard_input_exceeds
from basic.corpus.sources import TextIterator, TextSource, read_text_with_marks, size_of_bom, with_known_content
from basic.pretokenization import Pattern, SpecialTokens, chunks_of_array, chunks_of_stream, find_safe_position

T = TypeVar("T")

# The default: so large that starting a task and saving its result cost little, so small that little work is lost with a
# worker.
SHARD_BYTES = 1 << 27
# A kernel scans a chunk for special tokens, then for pre-tokens: the second time the chunk should be in the cache.
KERNEL_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Segment:
    """A byte range of a plain file, or an entire source of another kind.

    Attributes:
        size: size of the file in bytes; None if the server does not report it.
        version: changes when the content of the file changes.
        start, stop: byte offsets in a plain file; the range is from the first safe position at or after `start` to that
            at or after `stop`. `stop` is None for a source that can only be streamed.
        text_start: the byte offset of the text in a plain file: 3 after a byte order mark, otherwise 0.
    """

    source: TextSource
    size: int | None
    version: str
    start: int = 0
    stop: int | None = None
    text_start: int = 0

    @property
    def separator(self) -> str | None:
        """The special token between documents; None for text whose special tokens are in the text."""
        return self.source.end_of_text if self.source.has_marks else None

    @property
    def num_bytes(self) -> int:
        """The approximate number of bytes to read; for a compressed file its size."""
        return (self.size or 0) if self.stop is None else self.stop - self.start

    @property
    def is_mapped(self) -> bool:
        """Whether the range is read through a memory map."""
        return self.stop is not None and not self.source.is_remote


Shard = tuple[Segment, ...]


def entire_source(source: TextSource) -> Segment:
    """Return the segment that covers all of a source.

    Raises:
        InvalidInputError: the content is not text, as its first bytes show.
        OSError: the source is not a readable file.
    """
    source = with_known_content(source)
    size, version = source.size_and_version()
    if not source.is_remote and not source.reads_once:
        # A worker may have another current folder.
        source = replace(source, path=os.path.abspath(os.fspath(source)))
    if not source.is_plain or size is None or not source.supports_ranges():
        return Segment(source, size, version)
    text_start = min(size, size_of_bom(source))
    return Segment(source, size, version, text_start, size, text_start)


def kernels_for(segments: Sequence[Segment], choose: Callable[[int, int], T]) -> T:
    """Choose between kernels and the plain path for the text of segments.

    Args:
        choose: called with the size of the text in bytes and how many of them are mapped; what it returns is false for
            the plain path. If sizes are not known, it is asked again for a text that is just large enough, if it is.
    """
    mapped_bytes = sum(segment.num_bytes for segment in segments if segment.is_mapped)
    chosen = choose(sum(segment.num_bytes for segment in segments), mapped_bytes)
    return chosen or (
        choose(MIN_BYTES_FOR_KERNELS, mapped_bytes) if exceeds(segments, MIN_BYTES_FOR_KERNELS) else chosen
    )


def exceeds(segments: Sequence[Segment], num_bytes: int) -> bool:
    """Whether the text of segments has at least this many bytes; what is compressed is read until this is known."""
    unknown = [
        segment.source.compression is not None or segment.size is None or segment.source.known_content == "parquet"
        for segment in segments
    ]
    remaining = num_bytes
    for segment, is_unknown in zip(segments, unknown, strict=True):
        remaining -= 0 if is_unknown else segment.num_bytes
    if remaining <= 0:
        return True
    for segment in compress(segments, unknown):
        if segment.source.reads_once:
            texts = segment.source.path
            if texts.exceeds(remaining) if isinstance(texts, TextIterator) else standard_input_exceeds(remaining):
                return True
            continue
        for text in read_text_with_marks(segment.source, errors="replace"):
            remaining -= len(text)
            if remaining <= 0:
                return True
    return False


def total_text_bytes(segments: Sequence[Segment]) -> int | None:
    """Return the size of the text for a progress bar, or None if a source must be decompressed or parsed to know it."""
    if not all(segment.source.is_plain for segment in segments):
        return None
    return sum(segment.num_bytes for segment in segments)


def boundaries_fingerprint(pattern: Pattern) -> dict[str, str]:
    """Identify the rule by which a text is divided, as a part of the identity of work.

    Shards of other boundaries would overlap those that are done, or leave text out.
    """
    cuts = safe_cuts_of(pattern.splits)
    return {} if cuts is None else {"shard boundaries": cuts.fingerprint}


def inputs_fingerprint(segments: Sequence[Segment]) -> dict[str, Any]:
    """Return what identifies entire inputs in a work folder: names, sizes, versions, and how documents are read.

    Earlier versions found special tokens inside JSON documents too: their unfinished work on JSON lines is other work.
    """
    digest = hashlib.sha256()
    for segment in segments:
        source = segment.source
        state = [os.fspath(source), segment.size, segment.version, source.field, source.end_of_text]
        if source.has_marks:
            state.append("special tokens in documents are text")
        elif source.has_documents:
            state.append("documents")
        if source.has_documents and source.on_bad_line != "error":
            state.append(source.on_bad_line)
        digest.update(json.dumps(state).encode())
    num_bytes = sum(segment.size or 0 for segment in segments)
    return {"inputs": len(segments), "input_bytes": num_bytes, "input_sha256": digest.hexdigest()}


def split_into_shards(segments: Iterable[Segment], shard_bytes: int) -> list[Shard]:
    """Split inputs into shards of about `shard_bytes`, in order; a source that is streamed may make a larger one."""
    shards: list[Shard] = []
    shard: list[Segment] = []
    for entire in segments:
        start, stop = entire.start, entire.stop
        if stop is None or entire.num_bytes <= shard_bytes:
            split = [entire]
        else:
            ends = pairwise([*range(start, stop, shard_bytes), stop])
            split = [replace(entire, start=start, stop=stop) for start, stop in ends]
        for segment in split:
            if shard and segment.num_bytes + sum(each.num_bytes for each in shard) > shard_bytes:
                shards.append(tuple(shard))
                shard = []
            shard.append(segment)
    return [*shards, tuple(shard)] if shard else shards


class SegmentGroup(NamedTuple):
    """Consecutive segments that have the same special tokens."""

    segments: tuple[Segment, ...]
    separator: str | None
    special_tokens: SpecialTokens


def group_by_special_tokens(segments: Iterable[Segment], special_tokens: SpecialTokens) -> Iterator[SegmentGroup]:
    """Group segments by their `separator`.

    Args:
        special_tokens: those of plain text. Between the documents of JSON lines there is only a mark.
    """
    for separator, group in groupby(segments, lambda segment: segment.separator):
        special = special_tokens if separator is None else SpecialTokens.document_mark(separator)
        yield SegmentGroup(tuple(group), separator, special)


def read_segment(
    segment: Segment,
    special_tokens: SpecialTokens,
    pattern: Pattern,
    *,
    errors: str = "strict",
    on_read: Callable[[int], object] = lambda num_bytes: None,
    on_skip: Callable[[InvalidInputError], object] = lambda error: None,
) -> Iterator[str]:
    """Stream the text of a segment; the strings may end anywhere. See `basic.corpus.sources.read_text_with_marks`.

    Args:
        special_tokens, pattern: decide which positions are safe.
        on_read: called with the number of bytes of each block before it is decoded.
        on_skip: called with the error of each line or row that is left out.
    """

    def counted(blocks: Iterable[T], num_bytes: Callable[[T], int]) -> Iterator[T]:
        for block in blocks:
            on_read(num_bytes(block))
            yield block

    source = segment.source
    if segment.stop is None:
        return counted(
            read_text_with_marks(source, errors=errors, on_skip=on_skip),
            lambda text: len(text.encode(errors="surrogateescape")),
        )
    start, stop = _safe_range(segment, special_tokens, pattern)
    return decode_blocks(counted(source.blocks(start, stop), len), source, start, errors=errors)


def _safe_range(segment: Segment, special_tokens: SpecialTokens, pattern: Pattern) -> tuple[int, int]:
    def safe_position(offset: int) -> int:
        if offset <= segment.text_start:
            return segment.text_start
        return find_safe_position(segment.source.read, offset, segment.size or 0, special_tokens, pattern)

    return safe_position(segment.start), safe_position(segment.stop or 0)


class ShardChunks:
    """The text of a shard in chunks for the kernels; a chunk begins and ends at safe positions.

    It keeps the origin of each chunk until `mark_done` is called, for error messages, and the mapped bytes in memory.

    Args:
        errors: for bytes that are not UTF-8 in a stream: "strict" or "replace". Mapped bytes are not decoded here.
        on_skip: called with the error of each line or row that is left out.
        change: changes a stream of text, whose chunks then are those of the changed text. Positions where the text may
            be divided are not known before, so the segments must be entire sources.
        on_read: with `change`, called with the number of bytes of each block before it is changed.
    """

    def __init__(
        self,
        shard: Sequence[Segment],
        special_tokens: SpecialTokens,
        pattern: Pattern,
        *,
        errors: str = "strict",
        chunk_bytes: int = KERNEL_CHUNK_BYTES,
        on_skip: Callable[[InvalidInputError], object] = lambda error: None,
        change: Callable[[Iterable[str]], Iterable[str]] | None = None,
        on_read: Callable[[int], object] = lambda num_bytes: None,
    ) -> None:
        self._change, self._on_read = change, on_read
        self._shard, self._special_tokens, self._pattern = shard, special_tokens, pattern
        self._on_skip = on_skip
        self._errors, self._chunk_bytes = errors, chunk_bytes
        # Of each chunk: its segment, and the offset of its array in the source.
        self._unfinished: deque[tuple[Segment, Chunk, int]] = deque()

    def __iter__(self) -> Iterator[Chunk]:
        for segment in self._shard:
            for offset, chunk in self._mapped(segment) if self._is_mapped(segment) else self._streamed(segment):
                self._unfinished.append((segment, chunk, offset))
                yield chunk

    def mark_done(self) -> None:
        """Forget the first unfinished chunk."""
        segment, chunk, _ = self._unfinished.popleft()
        if self._is_mapped(segment):
            release_pages(*chunk)

    def describe_error(self, error: InvalidByteError) -> ValueError:
        """Return the error to raise for a wrong byte in the first unfinished chunk: it names the input and offset."""
        segment, (data, _, _), offset = self._unfinished[0]
        return error.described(segment.source, data, offset)

    def _is_mapped(self, segment: Segment) -> bool:
        return segment.is_mapped and self._change is None

    def _mapped(self, segment: Segment) -> Iterator[tuple[int, Chunk]]:
        """Chunks, each with the offset of its array in the source."""
        data = map_bytes(segment.source)
        if len(data) != segment.size:
            raise InvalidInputError(
                f"{os.fspath(segment.source)!r} has {len(data)} bytes, but had {segment.size} when the work began: "
                "a file must not change while it is read; run again"
            )
        start, stop = _safe_range(segment, self._special_tokens, self._pattern)
        for chunk in chunks_of_array(
            data, self._special_tokens, self._chunk_bytes, self._pattern, start=start, stop=stop
        ):
            yield 0, chunk

    def _streamed(self, segment: Segment) -> Iterator[tuple[int, Chunk]]:
        special_tokens, pattern = self._special_tokens, self._pattern
        offset = 0 if segment.stop is None else _safe_range(segment, special_tokens, pattern)[0]
        text: Iterable[str] = read_segment(
            segment, special_tokens, pattern, errors=self._errors, on_read=self._on_read, on_skip=self._on_skip
        )
        if self._change is not None:
            text = self._change(text)
        for data, start, stop in chunks_of_stream(text, special_tokens, self._chunk_bytes, pattern):
            yield offset, (data, start, stop)
            offset += stop
