"""Count the pre-tokens of a corpus of any size, on any number of machines.

    stage             reads               writes                                memory
    count a shard     128 MB of text      a table of its pre-tokens, sorted     one hash table of bounded size
    merge, as a tree  16 tables           one table                             a block of each table
    load the result   the last table      -                                     the pre-tokens that are frequent enough

The tables are files of a work folder (`basic.corpus.work_folder`), so an interrupted run resumes with the tables that
are missing. A table is deleted when it has been merged. Without a work folder the tables are temporary files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from basic.bpe import compiled, loading
from basic.bpe.arrays import Chunk, InvalidByteError, PretokenCounts, bytes_array
from basic.bpe.patterns.tables import automaton_of
from basic.common.arguments import check_errors_option
from basic.common.config_files import check_fields, check_numbers
from basic.common.progress import default_num_workers, progress_bar
from basic.corpus.count_tables import (
    FAN_IN,
    MergeTree,
    concatenate,
    drop_rare,
    merge_tables,
    read_table,
    sorted_table,
    write_table,
)
from basic.corpus.documents import SkippedLines, warn_of_skipped
from basic.corpus.shards import (
    KERNEL_CHUNK_BYTES,
    SHARD_BYTES,
    Segment,
    Shard,
    ShardChunks,
    boundaries_fingerprint,
    entire_source,
    group_by_special_tokens,
    inputs_fingerprint,
    kernels_for,
    read_segment,
    split_into_shards,
    total_text_bytes,
)
from basic.corpus.sources import Inputs, check_can_be_divided, check_separator, expand_inputs
from basic.corpus.work_folder import Record, WorkFolder, local_executor
from basic.pretokenization import GPT2_PATTERN, Pattern, SpecialTokens, pretokenize_stream, resolve_pattern

# Without kernels: a process gets less text at a time, and at least as much as is worth starting it for.
_MIN_PLAIN_BYTES, _MAX_PLAIN_BYTES = 1 << 20, 1 << 24
_MAX_PLAIN_PRETOKENS = 1 << 20
_TABLES_IN_MEMORY = 4

Advance = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class CountingOptions:
    """How pre-tokens are counted.

    The counts depend only on `errors`, and only those of text that is not UTF-8; `min_count` filters them.

    Raises:
        TypeError: an option has another type.
        InvalidInputError: a number is less than 1 (`fan_in`: 2), or `errors` has another value.
    """

    executor: Executor | None = None
    """Runs the tasks; by default threads or processes on this machine."""
    work_folder: str | os.PathLike | None = None
    """Folder for the tables, from which the same call resumes after an interruption. All workers must see it. By
    default a temporary folder, which workers on this machine see."""
    start_over: bool = False
    """Delete what the folder holds."""
    min_count: int = 1
    """Leave out pre-tokens whose total count is less. It is applied to the exact counts of all text, as a pre-token
    that is rare in every shard can be frequent in the corpus."""
    errors: str = "strict"
    """For bytes that are not UTF-8: "strict" raises, "replace" reads U+FFFD."""
    num_workers: int | None = None
    """Threads or processes of the default executor; by default the number of processors."""
    shard_bytes: int | None = None
    """The approximate size of a shard; by default it depends on the amount of text."""
    kernels: bool | None = None
    """Whether to use compiled code; by default if the text is large. The result is the same."""
    progress: bool = False
    """Whether to show progress bars."""
    chunk_bytes: int = KERNEL_CHUNK_BYTES
    """The approximate amount of text for one call of a kernel."""
    fan_in: int = FAN_IN
    """The number of tables that are merged at a time."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_numbers(self, ["num_workers", "shard_bytes", "min_count", "chunk_bytes"], 1)
        check_numbers(self, ["fan_in"], 2)  # one table would be merged into one, forever
        check_errors_option(self.errors)


_DEFAULT_OPTIONS = CountingOptions()


@dataclass(frozen=True, kw_only=True)
class ShardCounting:
    """How one shard is counted; sent to the workers.

    Attributes:
        max_pretokens: distinct pre-tokens in a counter before they become a table; None for the default.
        advance: called with the bytes that have been counted; only for workers that are threads of this process.
    """

    special_tokens: tuple[str, ...]
    pattern: Pattern = GPT2_PATTERN
    errors: str = "strict"
    kernels: bool = False
    num_threads: int = 1
    chunk_bytes: int = KERNEL_CHUNK_BYTES
    max_pretokens: int | None = None
    advance: Advance | None = None


def count_pretokens(
    inputs: Inputs, special_tokens: SpecialTokens, *, pattern: str | Pattern | None = None, **options: Any
) -> Counter[bytes]:
    """Count the pre-tokens of text: `build_count_table` as a counter. The options are those of `CountingOptions`."""
    return build_count_table(inputs, special_tokens, CountingOptions(**options), pattern=pattern).to_counter()


def build_count_table(
    inputs: Inputs,
    special_tokens: SpecialTokens,
    options: CountingOptions = _DEFAULT_OPTIONS,
    *,
    pattern: str | Pattern | None = None,
) -> PretokenCounts:
    """Count the pre-tokens of text, in parallel if the text is large.

    Args:
        inputs: text in UTF-8, in any form of `basic.corpus.sources`: a file, a glob, a URL, or several of them, or an
            iterator of documents. No pre-token crosses the end of an input or of a document. An input that is given
            twice is counted twice.
        special_tokens: boundaries that no pre-token crosses; they are not counted themselves.
        pattern: finds the pre-tokens, see `basic.pretokenization.resolve_pattern`; GPT-2's by default.

    Returns:
        The distinct pre-tokens, ascending by their bytes, and their counts.

    Raises:
        InvalidInputError: the text is not UTF-8 (the message names the byte offset), or the folder holds other work.
        DamagedFileError: a compressed input or a table is damaged.
        OSError: a file cannot be read, or workers died (ChildProcessError).
    """
    pattern = resolve_pattern(pattern)
    if options.executor is not None or options.work_folder is not None:
        check_can_be_divided(inputs)
    sources = expand_inputs(inputs)
    for source in sources:
        if source.known_content != "texts":  # the separator of an iterator does not matter here
            check_separator(source, special_tokens.tokens)
    segments = [entire_source(source) for source in sources]
    num_workers = options.num_workers or default_num_workers()
    kernels = _use_kernels(segments, pattern, options.kernels)
    shard_bytes = options.shard_bytes or _default_shard_bytes(segments, num_workers, kernels, options)
    work = {
        "kind": "counts of words",  # as written by earlier versions, whose work folders must open
        **inputs_fingerprint(segments),
        "special tokens": special_tokens.tokens,
        "pattern": pattern.short_form,
        **boundaries_fingerprint(pattern),
        "shard_bytes": shard_bytes,
    }
    if options.errors != "strict":  # not otherwise, as earlier versions did not write it
        work["errors"] = options.errors
    shards = split_into_shards(segments, shard_bytes)
    with (
        TemporaryDirectory(prefix="basic-") as temporary,
        WorkFolder(options.work_folder or temporary, work, start_over=options.start_over) as folder,
        progress_bar(
            options.progress, desc="counting", total=total_text_bytes(segments), unit="B", unit_scale=True
        ) as advance,
    ):
        # Threads of this process report progress chunk by chunk, other workers shard by shard.
        in_threads = options.executor is None and kernels
        counting = ShardCounting(
            special_tokens=special_tokens.tokens,
            pattern=pattern,
            errors=options.errors,
            kernels=kernels,
            num_threads=max(1, num_workers // len(shards)) if options.executor is None else 1,
            chunk_bytes=options.chunk_bytes,
            advance=folder.cancellable(advance) if in_threads else None,
        )
        tree = MergeTree(folder, len(shards), options.fan_in)
        advance(folder.bytes_done(tree.levels[0]))
        threads = kernels or any(source.reads_once for source in sources)
        executor = options.executor or local_executor(num_workers, len(shards), threads=threads)
        on_counted = None if in_threads else lambda record: advance(record["bytes"])
        record = tree.run(partial(count_shard, counting), shards, executor, on_counted, kernels=kernels)
        folder.remove_temporary_files()
        warn_of_skipped(folder.records(tree.levels[0]))
        table = concatenate(list(read_table(folder.path / record["file"], sha256=record["sha256"])))
        return drop_rare(table, options.min_count)


def _use_kernels(segments: Sequence[Segment], pattern: Pattern, kernels: bool | None) -> bool:
    if kernels is False or automaton_of(pattern.splits) is None:
        return False
    return kernels or kernels_for(segments, partial(loading.kernels_pay_off, "training"))


def _default_shard_bytes(segments: Sequence[Segment], num_workers: int, kernels: bool, options: CountingOptions) -> int:
    if options.executor is not None or options.work_folder is not None:
        return SHARD_BYTES  # another machine must find the same shards in the folder
    num_bytes = sum(segment.num_bytes for segment in segments)
    # Enough shards that no worker waits long for the last one, but large ones: each repeats the frequent pre-tokens.
    if not kernels:
        return min(max(num_bytes // (4 * num_workers), _MIN_PLAIN_BYTES), _MAX_PLAIN_BYTES)
    if num_bytes <= SHARD_BYTES:  # one shard, in which all threads count
        return SHARD_BYTES
    rounds = -(-num_bytes // (num_workers * SHARD_BYTES))
    return -(-num_bytes // (rounds * num_workers))


def count_shard(counting: ShardCounting, shard: Shard, path: str) -> Record:
    """Count the pre-tokens of a shard and write their table. A worker can run this anywhere, and more than once."""
    special_tokens, num_bytes, skipped = SpecialTokens(counting.special_tokens), 0, SkippedLines()

    def advance(amount: int) -> None:
        nonlocal num_bytes
        num_bytes += amount
        if counting.advance is not None:
            counting.advance(amount)

    count = _count_with_kernels if counting.kernels else _count_plain
    with TemporaryDirectory(suffix=".tmp", dir=Path(path).parent) as folder:
        tables: list[Any] = []
        # The order of the segments does not change the counts: a group for each kind of special tokens is enough.
        groups = group_by_special_tokens(sorted(shard, key=lambda segment: segment.separator or ""), special_tokens)
        counted = (count(counting, segments, special, advance, skipped) for segments, _, special in groups)
        for index, table in enumerate(chain.from_iterable(counted)):
            if index < _TABLES_IN_MEMORY:
                tables.append([table])
                continue
            write_table(Path(folder) / str(index), [table])
            tables.append(read_table(Path(folder) / str(index)))
        record = write_table(path, merge_tables(tables, kernels=counting.kernels))
        return {"bytes": num_bytes, **skipped.as_record(), **record}


def _count_with_kernels(
    counting: ShardCounting, shard: Shard, special_tokens: SpecialTokens, advance: Advance, skipped: SkippedLines
) -> Iterator[PretokenCounts]:
    chunks = ShardChunks(
        shard,
        special_tokens,
        counting.pattern,
        errors=counting.errors,
        chunk_bytes=counting.chunk_bytes,
        on_skip=skipped,
    )

    def on_chunk_done(num_bytes: int) -> None:
        chunks.mark_done()
        advance(num_bytes)

    automaton = automaton_of(counting.pattern.splits)
    assert automaton is not None, "only such a pattern is counted with kernels"
    tables = compiled.count_pretokens_in_chunks(
        # Streams have been decoded; those of documents have marks, which must stay.
        map(_valid_chunk, chunks) if counting.errors == "replace" and shard[0].separator is None else chunks,
        automaton,
        special_tokens.longest_first_bytes,
        counting.num_threads,
        on_chunk_done,
        max_pretokens=counting.max_pretokens or compiled.MAX_PRETOKENS,
    )
    try:
        for table in tables:
            if len(table.counts):
                yield table
    except InvalidByteError as error:
        raise chunks.describe_error(error) from None


def _valid_chunk(chunk: Chunk) -> Chunk:
    """The chunk with U+FFFD instead of bytes that are not UTF-8."""
    data, start, stop = chunk
    content = data[start:stop].tobytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        valid = bytes_array(content.decode(errors="replace").encode())
        return valid, 0, len(valid)
    return chunk


def _count_plain(
    counting: ShardCounting, shard: Shard, special_tokens: SpecialTokens, advance: Advance, skipped: SkippedLines
) -> Iterator[PretokenCounts]:
    """The plain version of the kernels."""
    pattern, counts = counting.pattern, Counter[str]()
    limit = counting.max_pretokens or _MAX_PLAIN_PRETOKENS

    def table() -> PretokenCounts:
        return sorted_table(Counter({pretoken.encode(): count for pretoken, count in counts.items()}))

    for segment in shard:
        text = read_segment(segment, special_tokens, pattern, errors=counting.errors, on_read=advance, on_skip=skipped)
        for pretokens, _ in pretokenize_stream(text, special_tokens, pattern):
            counts.update(pretokens)
            if len(counts) > limit:
                yield table()
                counts.clear()
    if counts:
        yield table()
