"""Counting the pre-tokens of a corpus of any size, on any number of machines.

    stage                what it reads           what it writes, to be kept         its memory
    count a shard        128 MB of text          its distinct words, sorted         a table of those, bounded
    add up, as a tree    16 tables               one table                          a block of each
    take the last table  the words of all text   -                                  those that are there often enough

A stage's files are kept in a work folder (`basic.corpus.work_folder`): an interrupted run resumes with what has no
file yet. Tables that have been added up are removed. Without a folder all of it goes to a temporary one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from basic.bpe import compiled, loading
from basic.bpe.arrays import InvalidByteError, PretokenCounts
from basic.common.progress import default_num_workers, progress_bar
from basic.corpus.count_tables import FAN_IN, add_up, at_least, joined, read_table, sorted_table, write_table
from basic.corpus.shards import SHARD_BYTES, Piece, Shard, ShardChunks, cut, fingerprint_of, known_bytes, text_of, whole
from basic.corpus.sources import Inputs, check_separator, sources_of
from basic.corpus.work_folder import Record, WorkFolder
from basic.pretokenization import GPT2_PATTERN, SpecialTokens, compile_pattern, pretokenize_stream

# Without kernels: processes get less at a time, and it takes some of it to be worth starting them.
_MIN_PLAIN_BYTES, _MAX_PLAIN_BYTES = 1 << 20, 1 << 24
_MIN_SHARDS_FOR_PROCESSES = 4
_MOST_PLAIN_WORDS = 1 << 20  # in a counter, before it is put out as a table
_TABLES_IN_MEMORY = 4

Advance = Callable[[int], object]


def count_pretokens(inputs: Inputs, special_tokens: SpecialTokens, **options: Any) -> Counter[bytes]:
    """How often each pre-token, as UTF-8, is there. The options are those of `count_words`."""
    return count_words(inputs, special_tokens, **options).to_counter()


def count_words(
    inputs: Inputs,
    special_tokens: SpecialTokens,
    *,
    pattern: str | None = None,
    executor: Executor | None = None,
    work_folder: str | os.PathLike | None = None,
    start_over: bool = False,
    min_count: int = 1,
    num_workers: int | None = None,
    shard_bytes: int | None = None,
    kernels: bool | None = None,
    progress: bool = False,
) -> PretokenCounts:
    """Count the pre-tokens of text, in parallel where it is large enough to be worth it.

    Args:
        inputs: text in UTF-8, plain or in a form of `basic.corpus.sources`: a file, a glob, a URL, or several of
            them; no pre-token goes from one to the next. One that is given twice is counted twice.
        special_tokens: hard boundaries, which are not counted themselves.
        pattern: another than GPT-2's, in the syntax of the `regex` package.
        executor: what counts; by default this machine's cores. The result is the same for any.
        work_folder: keeps what is done, so that the same call goes on where an interrupted one was. All workers must
            see it. By default a temporary one, which is good for workers on this machine.
        start_over: forget what the folder holds.
        min_count: leave out words that are there less often in all of the text together, once all is counted: the
            counts of the others are exact. (To cut the counts of parts would be cheaper, and wrong: what is rare in
            each of them may be frequent.)
        num_workers: threads or processes of the default executor, at least 1; by default one for each processor that
            this process may use.
        shard_bytes: about how much text is one part of the work, at least 1. The result is the same for any value.
        kernels: whether to count with compiled code; by default where the text is large.
        progress: whether to show a progress bar.

    Returns:
        The distinct words, ascending by their bytes, and how often each is there.

    Raises:
        ValueError: the text is not UTF-8 (the byte offset is named), a number is too small, or the folder holds other
            work.
        OSError: a file cannot be read; or workers died (ChildProcessError).
    """
    sources = sources_of(inputs)
    for source in sources:
        check_separator(source, special_tokens.tokens)
    num_workers = default_num_workers() if num_workers is None else num_workers
    compiled = compile_pattern(pattern)
    pieces = [whole(source) for source in sources]
    size = sum(piece.num_bytes for piece in pieces)
    mapped_bytes = sum(piece.num_bytes for piece in pieces if piece.is_mapped)
    kernels = (
        compiled is GPT2_PATTERN
        and kernels is not False
        and (bool(kernels) or loading.kernels_pay_off("training", size, num_mapped_bytes=mapped_bytes))
    )
    if shard_bytes is None:
        # What is kept must not depend on this machine.
        is_kept = executor is not None or work_folder is not None
        shard_bytes = SHARD_BYTES if is_kept else _shard_bytes(size, max(num_workers, 1), kernels)
    for name, value in [("num_workers", num_workers), ("shard_bytes", shard_bytes), ("min_count", min_count)]:
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    work = {
        "kind": "counts of words",
        **fingerprint_of(pieces),
        "special tokens": special_tokens.tokens,
        "pattern": compiled.pattern,
        "shard_bytes": shard_bytes,
    }
    shards = cut(pieces, shard_bytes)
    with (
        TemporaryDirectory(prefix="basic-") as temporary,
        WorkFolder(work_folder or temporary, work, start_over=start_over) as folder,
        progress_bar(progress, desc="counting", total=known_bytes(pieces), unit="B", unit_scale=True) as advance,
    ):
        num_threads = 1 if executor is not None else max(1, num_workers // max(len(shards), 1))
        # Our own threads move the bar as they go, others with each shard.
        live = folder.until_stopped(advance) if executor is None and kernels else None
        count = partial(count_shard, special_tokens.tokens, pattern, kernels, num_threads, live)
        run_on = executor or default_executor(num_workers, len(shards), threads=kernels)
        levels = _names(len(shards))
        advance(folder.bytes_done(levels[0]))
        last = _count_and_add_up(folder, levels, count, shards, run_on, kernels, None if live else advance)
        folder.tidy()
        return at_least(joined(list(read_table(folder.path / last["file"], sha256=last["sha256"]))), min_count)


def _shard_bytes(size: int, num_workers: int, kernels: bool) -> int:
    """Shards for this machine: enough that nobody waits long for the last one, large enough to repeat few words."""
    if not kernels:
        return min(max(size // (4 * num_workers), _MIN_PLAIN_BYTES), _MAX_PLAIN_BYTES)
    if size <= SHARD_BYTES:  # one shard, in which all threads count
        return SHARD_BYTES
    rounds = -(-size // (num_workers * SHARD_BYTES))
    return -(-size // (rounds * num_workers))


def default_executor(num_workers: int, num_shards: int, *, threads: bool) -> Callable[[], Executor]:
    """What makes an executor of this machine's cores: threads for kernels, which run side by side, else processes."""
    if not threads and num_workers > 1 and num_shards >= _MIN_SHARDS_FOR_PROCESSES:
        return partial(ProcessPoolExecutor, min(num_workers, num_shards))
    return partial(ThreadPoolExecutor, num_workers)


def _names(num_shards: int) -> list[list[str]]:
    """The files of all tables: those of the shards, then those of each level of the tree, up to the last one."""
    levels = [[f"counts-0-{number:06}.words" for number in range(num_shards)]]
    while len(levels[-1]) > 1:
        num_groups = -(-len(levels[-1]) // FAN_IN)
        levels.append([f"counts-{len(levels)}-{number:06}.words" for number in range(num_groups)])
    return levels


def _count_and_add_up(
    folder: WorkFolder,
    levels: Sequence[Sequence[str]],
    count: Callable[..., Record],
    shards: Sequence[Shard],
    executor: Executor | Callable[[], Executor],
    kernels: bool,
    advance: Advance | None,
) -> Record:
    """The record of the table of all words, once it is made."""

    def parts_of(level: int, number: int) -> range:
        """The numbers of the tables, one level down, that are added up to this one."""
        return range(number * FAN_IN, min((number + 1) * FAN_IN, len(levels[level - 1])))

    # From the last table back: what is there needs nothing of what it was made of.
    wanted: list[list[int]] = [[] for _ in levels]
    wanted[-1] = [0]
    for level in range(len(levels) - 1, 0, -1):
        wanted[level] = [number for number in wanted[level] if folder.record(levels[level][number]) is None]
        wanted[level - 1] = [part for number in wanted[level] for part in parts_of(level, number)]
    tasks = ((levels[0][i], (shards[i],)) for i in wanted[0])
    folder.run(count, tasks, executor, None if advance is None else lambda record: advance(record["bytes"]))
    for level in range(1, len(levels)):

        def tables(number: int, level: int = level) -> list[tuple[str, str]]:
            records = (folder.record(levels[level - 1][part]) for part in parts_of(level, number))
            return [(str(folder.path / record["file"]), record["sha256"]) for record in records if record]

        merges = ((levels[level][i], (tables(i), kernels)) for i in wanted[level])
        folder.run(add_up_tables, merges, executor)
        for name in levels[level - 1]:
            (folder.path / name).unlink(missing_ok=True)
    record = folder.record(levels[-1][0])
    assert record is not None
    return record


def count_shard(
    special_tokens: tuple[str, ...],
    pattern: str | None,
    kernels: bool,
    num_threads: int,
    live: Advance | None,
    shard: Shard,
    path: str,
) -> Record:
    """Count the words of a shard and write the table of them; may run anywhere, any number of times."""
    special, num_bytes = SpecialTokens(special_tokens), 0

    def advance(amount: int) -> None:
        nonlocal num_bytes
        num_bytes += amount
        if live is not None:
            live(amount)

    if kernels:
        tables = _count_with_kernels(shard, special, num_threads, advance)
    else:
        tables = _count_plainly(shard, special, pattern, advance)
    with TemporaryDirectory(suffix=".tmp", dir=Path(path).parent) as folder:
        kept: list[Any] = []
        for number, table in enumerate(tables):
            if number < _TABLES_IN_MEMORY:
                kept.append([table])
                continue
            write_table(Path(folder) / str(number), [table])
            kept.append(read_table(Path(folder) / str(number)))
        return {"bytes": num_bytes, **write_table(path, add_up(kept, kernels=kernels))}


def add_up_tables(tables: list[tuple[str, str]], kernels: bool, path: str) -> Record:
    """Write the table of all words of some tables, given by path and checksum."""
    return write_table(path, add_up([read_table(table, sha256=sha256) for table, sha256 in tables], kernels=kernels))


def _count_with_kernels(
    shard: Shard, special_tokens: SpecialTokens, num_threads: int, advance: Advance
) -> Iterator[PretokenCounts]:
    chunks = ShardChunks(shard, special_tokens)

    def done(num_bytes: int) -> None:
        chunks.done()
        advance(num_bytes)

    try:
        for words in compiled.count_pretokens_in_chunks(chunks, special_tokens.longest_first_bytes, num_threads, done):
            if len(words.counts):
                yield words
    except InvalidByteError as error:
        raise chunks.explain(error) from None


def _count_plainly(
    shard: Sequence[Piece], special_tokens: SpecialTokens, pattern: str | None, advance: Advance
) -> Iterator[PretokenCounts]:
    """The readable twin."""
    compiled, counts = compile_pattern(pattern), Counter[str]()

    def table() -> PretokenCounts:
        return sorted_table(Counter({word.encode(): count for word, count in counts.items()}))

    for piece in shard:
        text = text_of(piece, special_tokens, compiled, read=advance)
        for pretokens, _ in pretokenize_stream(text, special_tokens, compiled):
            counts.update(pretokens)
            if len(counts) > _MOST_PLAIN_WORDS:
                yield table()
                counts.clear()
    if counts:
        yield table()
