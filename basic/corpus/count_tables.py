"""Count tables: the distinct pre-tokens of a text with their counts, sorted, on disk; merged in bounded memory.

A table is a file of blocks. A block is three NumPy arrays as `numpy.save` writes them: the bytes of the pre-tokens, the
offset where each begins, and the counts. Pre-tokens ascend by their bytes through all blocks of a table. So tables of
any size are merged as in an external merge sort, with one block of each table in memory:

    the smallest last pre-token of the current blocks ("cat") is the limit up to which the merge is complete
    ["a", "cat"] ...   ["b", "dog"] ...   ->   yield "a", "b", "cat"; read the next block of the first table
"""

from __future__ import annotations

import os
import secrets
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from basic.bpe.arrays import PretokenCounts
from basic.bpe.compiled import sort_pretokens
from basic.common.errors import DamagedFileError
from basic.common.files import open_file, sha256_of_file
from basic.corpus.work_folder import Record, WorkFolder

BLOCK_PRETOKENS = 1 << 16
FAN_IN = 16  # tables that are merged at a time: each needs a block of one or two megabytes in memory


def write_table(
    path: str | os.PathLike, blocks: Iterable[PretokenCounts], *, block_pretokens: int = BLOCK_PRETOKENS
) -> dict[str, Any]:
    """Write a table.

    Args:
        blocks: of any size; the pre-tokens ascend through all of them.
        block_pretokens: the largest number of pre-tokens in a block of the file.

    Returns:
        `words` (the number of distinct pre-tokens), `count` (the sum of their counts), `file_bytes` and `sha256`.
    """
    num_pretokens = total_count = 0
    temporary = Path(f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "xb") as file:
        for block in blocks:
            for start in range(0, len(block.counts), block_pretokens):
                for array in _slice(block, start, min(start + block_pretokens, len(block.counts))):
                    np.save(file, array)
            num_pretokens += len(block.counts)
            total_count += int(block.counts.sum())
        file_bytes = file.tell()
    record = {"words": num_pretokens, "count": total_count, "file_bytes": file_bytes}
    record["sha256"] = sha256_of_file(temporary)
    # No fsync: on a small shard it would take longer than the counting. A file that a power cut damages is recognized
    # by its size or its checksum, and is made again.
    os.replace(temporary, path)
    return record


def read_table(path: str | os.PathLike, *, sha256: str | None = None) -> Iterator[PretokenCounts]:
    """Read the blocks of a table, one at a time.

    Raises:
        DamagedFileError: the file does not have the given SHA-256.
    """
    if sha256 is not None and sha256_of_file(path) != sha256:
        raise DamagedFileError(f"{os.fspath(path)!r} has changed since it was written; run again, which makes it again")
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        while file.tell() < size:
            yield PretokenCounts(*(np.load(file) for _ in PretokenCounts._fields))


def merge_tables(
    tables: Sequence[Iterable[PretokenCounts]], *, kernels: bool, fan_in: int = FAN_IN
) -> Iterator[PretokenCounts]:
    """Merge sorted tables into one; a pre-token's counts are summed.

    Args:
        kernels: whether to sort with compiled code; the result is the same.

    Yields:
        The blocks of the merged table.
    """
    while len(tables) > fan_in:
        groups = [tables[start : start + fan_in] for start in range(0, len(tables), fan_in)]
        tables = [merge_tables(group, kernels=kernels, fan_in=fan_in) for group in groups]
    if len(tables) == 1:
        yield from tables[0]
        return
    iterators = [iter(table) for table in tables]
    blocks: list[PretokenCounts | None] = [next(iterator, None) for iterator in iterators]
    while unfinished := [block for block in blocks if block is not None]:
        limit = min(_pretoken_at(block, len(block.counts) - 1) for block in unfinished)
        complete = []
        for i, block in enumerate(blocks):
            if block is None:
                continue
            stop = bisect_right(range(len(block.counts)), limit, key=lambda n: _pretoken_at(block, n))
            complete.append(_slice(block, 0, stop))
            blocks[i] = _slice(block, stop, len(block.counts)) if stop < len(block.counts) else next(iterators[i], None)
        yield sort_pretokens(concatenate(complete)) if kernels else _merge_plain(complete)


def concatenate(blocks: Sequence[PretokenCounts]) -> PretokenCounts:
    """Concatenate blocks into one."""
    if len(blocks) == 1:
        return blocks[0]
    ends = np.cumsum([0, *(len(block.data) for block in blocks)])
    starts = [block.starts[:-1] + end for block, end in zip(blocks, ends, strict=False)]
    return PretokenCounts(
        np.concatenate([np.empty(0, np.uint8), *(block.data for block in blocks)]),
        np.concatenate([*starts, ends[-1:]]),
        np.concatenate([np.empty(0, np.int64), *(block.counts for block in blocks)]),
    )


def drop_rare(table: PretokenCounts, min_count: int) -> PretokenCounts:
    """Remove the pre-tokens whose count is less than `min_count`."""
    frequent = table.counts >= min_count
    if frequent.all():
        return table
    lengths = np.diff(table.starts)
    starts = np.concatenate([[0], np.cumsum(lengths[frequent])])
    return PretokenCounts(table.data[np.repeat(frequent, lengths)], starts, table.counts[frequent])


def sorted_table(counts: Counter[bytes]) -> PretokenCounts:
    """Convert a counter to a table, sorted by the bytes of the pre-tokens."""
    return PretokenCounts.from_counts({pretoken: counts[pretoken] for pretoken in sorted(counts)})


def _merge_plain(blocks: Sequence[PretokenCounts]) -> PretokenCounts:
    """The plain version of the kernel."""
    counts: Counter[bytes] = Counter()
    for block in blocks:
        counts.update(block.to_counter())
    return sorted_table(counts)


def _pretoken_at(block: PretokenCounts, index: int) -> bytes:
    return block.data[block.starts[index] : block.starts[index + 1]].tobytes()


def _slice(block: PretokenCounts, start: int, stop: int) -> PretokenCounts:
    """The pre-tokens with these indices, as views."""
    first, last = block.starts[start], block.starts[stop]
    return PretokenCounts(block.data[first:last], block.starts[start : stop + 1] - first, block.counts[start:stop])


class MergeTree:
    """The tables of a work folder: one of each shard, and on each further level a merged one of every `fan_in` tables.

    Attributes:
        levels: the file names of each level; the last level has one table, the result.
    """

    def __init__(self, folder: WorkFolder, num_shards: int, fan_in: int) -> None:
        self._folder, self._fan_in = folder, fan_in
        self.levels = [[f"counts-0-{index:06}.words" for index in range(num_shards)]]
        while (num_tables := len(self.levels[-1])) > 1:
            names = [f"counts-{len(self.levels)}-{index:06}.words" for index in range(-(-num_tables // fan_in))]
            self.levels.append(names)

    def run(
        self,
        count_shard: Callable[..., Record],
        shards: Sequence[Any],
        executor: Executor | Callable[[], Executor],
        on_counted: Callable[[Record], object] | None,
        *,
        kernels: bool,
    ) -> Record:
        """Make the tables that are not finished; return the record of the result.

        Args:
            count_shard: called with a shard and the path of its table; returns the record of the task.
            on_counted: called with the record of each shard.
        """
        missing = self._missing()
        tasks = [(self.levels[0][i], (shards[i],)) for i in missing[0]]
        self._folder.run(count_shard, tasks, executor, on_counted)
        for level in range(1, len(self.levels)):
            tasks = [(self.levels[level][i], (self._inputs(level, i),)) for i in missing[level]]
            self._folder.run(partial(merge_table_files, kernels), tasks, executor)
            for name in self.levels[level - 1]:
                (self._folder.path / name).unlink(missing_ok=True)
        record = self._folder.finished_record(self.levels[-1][0])
        assert record is not None
        return record

    def _missing(self) -> list[list[int]]:
        """The tables to make on each level. From the result down: a finished table needs none of its inputs."""
        missing: list[list[int]] = [[] for _ in self.levels]
        needed = [0]
        for level in reversed(range(len(self.levels))):
            missing[level] = [i for i in needed if self._folder.finished_record(self.levels[level][i]) is None]
            needed = [child for i in missing[level] for child in self._children(level, i)]
        return missing

    def _children(self, level: int, index: int) -> range:
        """The indices of the tables, one level down, that are merged into this one."""
        if level == 0:
            return range(0)
        return range(index * self._fan_in, min((index + 1) * self._fan_in, len(self.levels[level - 1])))

    def _inputs(self, level: int, index: int) -> list[tuple[str, str]]:
        """The path and the SHA-256 of each table that is merged into this one."""
        names = [self.levels[level - 1][child] for child in self._children(level, index)]
        records = [record for record in map(self._folder.finished_record, names) if record]
        return [(str(self._folder.path / record["file"]), record["sha256"]) for record in records]


def merge_table_files(kernels: bool, tables: list[tuple[str, str]], path: str) -> Record:
    """Merge tables, each given by its path and SHA-256, and write the result."""
    return write_table(
        path, merge_tables([read_table(table, sha256=sha256) for table, sha256 in tables], kernels=kernels)
    )
