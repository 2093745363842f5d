"""Counting words: scan, look up, add one.

A `PretokenCounter` belongs to one thread; what several have counted is added up in sorted tables (`bpe_sort`). Its memory
grows with the distinct words, not with the text, of which it keeps nothing. One core scans and counts 300 to 400 MB/s
of English.
"""

from __future__ import annotations

import numpy as np

from basic.bpe.arrays import PretokenCounts
from basic.bpe.kernels.hash_table import (
    DONE,
    ENTRIES,
    FULL,
    I64,
    LENGTH_SHIFT,
    LONG,
    POOL_USED,
    POSITION,
    PROBLEM,
    ROW,
    SHORT_BYTES,
    STATE_LENGTH,
    WRONG,
    block_keys,
    first_row,
    hash_of_long,
    in_pool,
    is_long,
    key1_in_table,
    key1_of_long,
    new_keys,
    new_table,
    put_in_pool,
    rehash,
)
from basic.bpe.kernels.instructions import U64, kernel, store8
from basic.bpe.kernels.scan import BLOCK, ROOM, end_of_long_word, find_special, learn_classes, new_scratch, scan_block

# A block makes at most BLOCK entries, whose bytes take at most this much of the pool.
_POOL_BLOCK = BLOCK // 8 + BLOCK // SHORT_BYTES


@kernel
def _find_or_add(data, start, length, key0, key1, row, table, pool, state):
    """The row of a word, a new one with the count 0 if need be; there must be room."""
    mask = U64(len(table) // ROW - 1)
    while True:
        r = row * U64(ROW)
        if table[r + U64(1)] == U64(0):
            table[r], table[r + U64(1)] = key0, key1
            if is_long(key1):
                table[r + U64(3)] = U64(state[POOL_USED])
                state[POOL_USED] = put_in_pool(data, start, length, pool, state[POOL_USED])
            state[ENTRIES] += 1
            return r
        if (
            table[r] == key0
            and table[r + U64(1)] == key1
            and (not is_long(key1) or in_pool(data, start, length, pool, I64(table[r + U64(3)])))
        ):
            return r
        row = (row + U64(1)) & mask


@kernel
def _count_words(data, stop, code_classes, special_bytes, special_starts, first_bytes, table, pool, work, state):
    """Count the words from state[POSITION] to `stop`.

    Returns:
        DONE; FULL, where the table or the pool has no room for another block; WRONG, where a character is not UTF-8
        or of unknown class; state[PROBLEM] says where. Called again, it goes on.
    """
    scratch, places, keys = work
    text, key0s, key1s, rows = scratch[0], keys[0], keys[1], keys[2]
    position = state[POSITION]
    while position < stop:
        segment_stop, special = find_special(data, position, stop, special_bytes, special_starts, first_bytes)
        while position < segment_stop:
            state[POSITION] = position
            if (state[ENTRIES] + BLOCK) * 2 * ROW > len(table) or state[POOL_USED] + _POOL_BLOCK > len(pool):
                return FULL
            num_words, wrong = scan_block(data, position, segment_stop, code_classes, scratch, places)
            if wrong >= 0:
                state[PROBLEM] = position + wrong
                return WRONG
            if num_words == 0:
                end = end_of_long_word(data, position, segment_stop, code_classes)
                if end < 0:
                    state[PROBLEM] = -1 - end
                    return WRONG
                length = end - position
                if state[POOL_USED] + length // 8 + 1 > len(pool):
                    return FULL
                key0, key1 = hash_of_long(data, position, length), key1_of_long(length)
                row = first_row(key0, key1, table)
                table[_find_or_add(data, position, length, key0, key1, row, table, pool, state) + U64(2)] += U64(1)
                position = end
                continue
            block_keys(text, places, num_words, table, keys)
            for j in range(U64(num_words)):
                r = rows[j] * U64(ROW)
                if ((table[r] ^ key0s[j]) | (table[r + U64(1)] ^ key1s[j])) != U64(0):
                    key1 = key1_in_table(key1s[j])
                    start, length = position + places[j], places[j + U64(1)] - places[j]
                    r = _find_or_add(data, start, length, key0s[j], key1, rows[j], table, pool, state)
                table[r + U64(2)] += U64(1)
            position += places[num_words]
        if special >= 0:
            position += special_starts[special + 1] - special_starts[special]
    state[POSITION] = position
    return DONE


@kernel
def _words_from(table, pool, data, starts, counts):
    """Write the words of a table to arrays, `data` with 16 bytes to spare."""
    n, to = 0, 0
    for r in range(0, len(table), ROW):
        key1 = table[r + 1]
        if key1 == U64(0):
            continue
        if is_long(key1):
            length, offset = I64(key1 & U64((1 << LENGTH_SHIFT) - 1)), I64(table[r + 3])
            for i in range((length + 7) // 8):
                store8(data, U64(to + min(8 * i, length - 8)), pool[offset + i])
        else:
            length = I64(key1 >> U64(LENGTH_SHIFT))
            store8(data, U64(to), table[r])
            store8(data, U64(to + 8), key1)
        starts[n], counts[n] = to, I64(table[r + 2])
        to += length
        n += 1
    starts[n] = to


class PretokenCounter:
    """Counts words for one thread.

    Args:
        code_classes: of `bpe_scan.new_classes`.
        specials: bytes of the special tokens, their starts, and the bytes that they begin with.
    """

    def __init__(self, code_classes: np.ndarray, specials: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        self._code_classes, self._specials = code_classes, specials
        self._table, self._pool = new_table(1 << 14), np.zeros(1 << 12, np.uint64)
        self._state = np.zeros(STATE_LENGTH, np.int64)
        self._work = (new_scratch(), np.zeros(ROOM, np.int64), new_keys(ROOM))

    def add_text(self, data: np.ndarray, start: int, stop: int) -> int | None:
        """Count the words of data[start:stop], which must begin and end where words do.

        Returns:
            None when all are counted, else the place of the first byte that is not UTF-8.
        """
        state = self._state
        state[POSITION] = start
        status = FULL
        while status != DONE:
            status = _count_words(
                data, stop, self._code_classes, *self._specials, self._table, self._pool, self._work, state
            )
            if status == FULL:
                self.grow()
            elif status == WRONG and not learn_classes(self._code_classes, data, state[PROBLEM]):
                return int(state[PROBLEM])
        return None

    @property
    def num_words(self) -> int:
        """Distinct words so far."""
        return int(self._state[ENTRIES])

    def words(self) -> PretokenCounts:
        """All words so far, in no order."""
        key1s = self._table[1::ROW]
        is_long_ = key1s >> np.uint64(LENGTH_SHIFT) == LONG
        lengths = np.where(is_long_, key1s & np.uint64((1 << LENGTH_SHIFT) - 1), key1s >> np.uint64(LENGTH_SHIFT))
        num_words, num_bytes = int(self._state[ENTRIES]), int(lengths.sum())
        data = np.empty(num_bytes + 16, np.uint8)
        words = PretokenCounts(data, np.empty(num_words + 1, np.int64), np.empty(num_words, np.int64))
        _words_from(self._table, self._pool, *words)
        return words._replace(data=data[:num_bytes])

    def grow(self) -> None:
        """Four times the room for what has too little; that costs little each time a word is moved."""
        if (self._state[ENTRIES] + BLOCK) * 2 * ROW > len(self._table):
            larger = new_table(len(self._table) // ROW * 4)
            rehash(self._table, larger)
            self._table = larger
        else:
            pool = np.zeros(len(self._pool) * 4, np.uint64)
            pool[: len(self._pool)] = self._pool
            self._pool = pool
