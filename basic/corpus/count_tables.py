"""Tables of words and their counts on the disk, sorted, and adding them up in bounded memory.

A table is a file of blocks, each three NumPy arrays one after the other as `numpy.save` writes them: the bytes of the
words, where each begins, and how often each is there. The words ascend by their bytes through all blocks. So tables of
any size are added up from front to back, with one block of each in memory, like the merging of sorted files:

    of all tables' present blocks, the one that ends first says how far the words are complete: "cat" here
    ["a", "cat"] ...   ["b", "dog"] ...   ->   add up "a", "cat" and "b"; the first table's next block is read
"""

from __future__ import annotations

import hashlib
import os
import secrets
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from basic.bpe.arrays import Words
from basic.bpe.compiled import sort_words

BLOCK_WORDS = 1 << 16
FAN_IN = 16  # tables that are added up at a time: each has a block of a megabyte or two in memory


def write_table(path: str | os.PathLike, blocks: Iterable[Words]) -> dict[str, Any]:
    """Write the words, which must ascend through all blocks.

    Returns:
        What is to be remembered of it: `words`, `count` (of all together), `file_bytes` and `sha256`.
    """
    num_words = count = 0
    temporary = Path(f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "xb") as file:
        for block in blocks:
            for start in range(0, len(block.counts), BLOCK_WORDS):
                for array in _part(block, start, min(start + BLOCK_WORDS, len(block.counts))):
                    np.save(file, array)
            num_words += len(block.counts)
            count += int(block.counts.sum())
        file_bytes = file.tell()
    record = {"words": num_words, "count": count, "file_bytes": file_bytes, "sha256": _digest(temporary)}
    # Not forced to the disk, which would take longer than the work on a small shard: what a power cut has spoiled is
    # known by its size or its checksum, and can be counted again.
    os.replace(temporary, path)
    return record


def read_table(path: str | os.PathLike, *, sha256: str | None = None) -> Iterator[Words]:
    """The blocks of a table.

    Raises:
        ValueError: the file is not what it was when it was written.
    """
    if sha256 is not None and _digest(path) != sha256:
        raise ValueError(f"{os.fspath(path)!r} has changed since it was written; remove it, and run the same again")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while file.tell() < size:
            yield Words(*(np.load(file) for _ in Words._fields))


def add_up(tables: Sequence[Iterable[Words]], *, kernels: bool) -> Iterator[Words]:
    """The words of all tables, each once, ascending, with the sum of its counts.

    Args:
        tables: the blocks of each, the words ascending.
        kernels: whether to sort with compiled code; the result is the same.
    """
    while len(tables) > FAN_IN:
        groups = [tables[start : start + FAN_IN] for start in range(0, len(tables), FAN_IN)]
        tables = [add_up(group, kernels=kernels) for group in groups]
    if len(tables) == 1:
        yield from tables[0]
        return
    rest = [iter(table) for table in tables]
    heads: list[Words | None] = [next(blocks, None) for blocks in rest]
    while present := [head for head in heads if head is not None]:
        bound = min(_word(head, len(head.counts) - 1) for head in present)
        parts = []
        for i, head in enumerate(heads):
            if head is None:
                continue
            stop = bisect_right(range(len(head.counts)), bound, key=lambda n: _word(head, n))
            parts.append(_part(head, 0, stop))
            heads[i] = _part(head, stop, len(head.counts)) if stop < len(head.counts) else next(rest[i], None)
        yield sort_words(joined(parts)) if kernels else _sorted_words_plainly(parts)


def joined(parts: Sequence[Words]) -> Words:
    """The words of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([0, *(len(part.data) for part in parts)])
    starts = [part.starts[:-1] + end for part, end in zip(parts, ends, strict=False)]
    return Words(
        np.concatenate([np.empty(0, np.uint8), *(part.data for part in parts)]),
        np.concatenate([*starts, ends[-1:]]),
        np.concatenate([np.empty(0, np.int64), *(part.counts for part in parts)]),
    )


def at_least(words: Words, min_count: int) -> Words:
    """The words that are there so often."""
    keep = words.counts >= min_count
    if keep.all():
        return words
    lengths = np.diff(words.starts)
    starts = np.concatenate([[0], np.cumsum(lengths[keep])])
    return Words(words.data[np.repeat(keep, lengths)], starts, words.counts[keep])


def sorted_table(counts: Counter[bytes]) -> Words:
    """The words of a counter, ascending."""
    return Words.from_counts({word: counts[word] for word in sorted(counts)})


def _sorted_words_plainly(parts: Sequence[Words]) -> Words:
    """The readable twin of the kernel."""
    counts: Counter[bytes] = Counter()
    for part in parts:
        counts.update(part.counter())
    return sorted_table(counts)


def _word(words: Words, n: int) -> bytes:
    return words.data[words.starts[n] : words.starts[n + 1]].tobytes()


def _part(words: Words, start: int, stop: int) -> Words:
    """The words from one number to another, not copied."""
    first, last = words.starts[start], words.starts[stop]
    return Words(words.data[first:last], words.starts[start : stop + 1] - first, words.counts[start:stop])


def _digest(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
