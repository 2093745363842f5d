"""Count pre-tokens: scan, look up, add one. And sort them, so that the counts of many shards become one table.

A `PretokenCounter` belongs to one thread. Its memory grows with the number of distinct pre-tokens, not with the text,
which it does not keep. One core counts 300 to 400 MB/s of English.

The results of several threads are sorted by the bytes of the pre-tokens: first by their first eight bytes, as a number,
which NumPy does with vector instructions; then the few with the same first eight bytes by all their bytes. A million
pre-tokens take a tenth of a second.
"""

from __future__ import annotations

import numpy as np

from basic.bpe.arrays import PretokenCounts
from basic.bpe.kernels.hash_table import (
    DONE,
    ENTRIES,
    FULL,
    I64,
    INVALID,
    LENGTH_SHIFT,
    LONG,
    POOL_USED,
    POSITION,
    PROBLEM,
    SHORT_BYTES,
    SLOT_LENGTH,
    STATE_LENGTH,
    block_keys,
    compare_bytes,
    find_slot,
    first_slot,
    hash_of_long,
    is_long,
    key1_in_table,
    key1_of_long,
    new_keys,
    new_table,
    put_in_pool,
    rehash,
)
from basic.bpe.kernels.instructions import U64, readonly, store8
from basic.bpe.kernels.scan import BLOCK, SCRATCH_LENGTH, PatternTables, end_of_long_pretoken, new_scratch, scan_block
from basic.bpe.kernels.special_tokens import SpecialTokenTables, find_special
from basic.common.native.kernel import kernel

# A block has at most BLOCK new pre-tokens, whose bytes take at most this many elements of the pool.
_POOL_BLOCK = BLOCK // 8 + BLOCK // SHORT_BYTES


@kernel
def _find_or_add(data, start, length, key0, key1, slot, table, pool, state):
    """The index in the table of a pre-token's slot; a new pre-token gets a free slot with the count 0."""
    base = find_slot(data, start, length, key0, key1, slot, table, pool, U64(0))
    if table[base + U64(1)] == U64(0):
        table[base], table[base + U64(1)] = key0, key1
        if is_long(key1):
            table[base + U64(3)] = U64(state[POOL_USED])
            state[POOL_USED] = put_in_pool(data, start, length, pool, state[POOL_USED])
        state[ENTRIES] += 1
    return base


@kernel
def _count_pretokens(data, stop, pattern, specials, table, pool, work, state):
    """Count the pre-tokens from state[POSITION] to `stop`; a later call continues where this one stopped.

    Returns:
        DONE; FULL if the table or the pool may be too small for another block; or INVALID if a character is not UTF-8,
        with its offset in state[PROBLEM].
    """
    scratch, starts, keys = work
    text, key0s, key1s, slots = scratch[0][0], keys[0], keys[1], keys[2]
    position = state[POSITION]
    while position < stop:
        segment_stop, special = find_special(data, position, stop, specials)
        while position < segment_stop:
            state[POSITION] = position
            if (state[ENTRIES] + BLOCK) * 2 * SLOT_LENGTH > len(table) or state[POOL_USED] + _POOL_BLOCK > len(pool):
                return FULL
            num_pretokens, invalid = scan_block(data, position, segment_stop, pattern, scratch, starts)
            if invalid >= 0:
                state[PROBLEM] = position + invalid
                return INVALID
            if num_pretokens == 0:
                end = end_of_long_pretoken(data, position, segment_stop, pattern, starts)
                if end < 0:
                    state[PROBLEM] = -1 - end
                    return INVALID
                length = end - position
                if state[POOL_USED] + length // 8 + 1 > len(pool):
                    return FULL
                key0, key1 = hash_of_long(data, position, length), key1_of_long(length)
                slot = first_slot(key0, key1, table)
                table[_find_or_add(data, position, length, key0, key1, slot, table, pool, state) + U64(2)] += U64(1)
                position = end
                continue
            block_keys(text, starts, num_pretokens, table, keys)
            for j in range(U64(num_pretokens)):
                base = slots[j] * U64(SLOT_LENGTH)
                if ((table[base] ^ key0s[j]) | (table[base + U64(1)] ^ key1s[j])) != U64(0):
                    key1 = key1_in_table(key1s[j])
                    start, length = position + starts[j], starts[j + U64(1)] - starts[j]
                    base = _find_or_add(data, start, length, key0s[j], key1, slots[j], table, pool, state)
                table[base + U64(2)] += U64(1)
            position += starts[num_pretokens]
        if special >= 0:
            position += specials[5][special]  # its length
    state[POSITION] = position
    return DONE


@kernel
def _write_pretokens(table, pool, data, starts, counts):
    """Write the pre-tokens of a table to arrays; `data` has 16 bytes more than it needs."""
    n, offset_out = 0, 0
    for base in range(0, len(table), SLOT_LENGTH):
        key1 = table[base + 1]
        if key1 == U64(0):
            continue
        if is_long(key1):
            length, offset = I64(key1 & U64((1 << LENGTH_SHIFT) - 1)), I64(table[base + 3])
            for i in range((length + 7) // 8):
                store8(data, U64(offset_out + min(8 * i, length - 8)), pool[offset + i])
        else:
            length = I64(key1 >> U64(LENGTH_SHIFT))
            store8(data, U64(offset_out), table[base])
            store8(data, U64(offset_out + 8), key1)
        starts[n], counts[n] = offset_out, I64(table[base + 2])
        offset_out += length
        n += 1
    starts[n] = offset_out


class PretokenCounter:
    """Counts pre-tokens, for one thread."""

    def __init__(self, pattern: PatternTables, specials: SpecialTokenTables) -> None:
        self._pattern, self._specials = pattern, specials
        self._table, self._pool = new_table(1 << 14), np.zeros(1 << 12, np.uint64)
        self._state = np.zeros(STATE_LENGTH, np.int64)
        self._work = (new_scratch(), np.zeros(SCRATCH_LENGTH, np.int64), new_keys(SCRATCH_LENGTH))

    def add_text(self, data: np.ndarray, start: int, stop: int) -> int | None:
        """Count the pre-tokens of data[start:stop], which must start and end at safe positions.

        Returns:
            None, or the offset of the first byte that is not UTF-8.
        """
        state = self._state
        state[POSITION] = start
        status = FULL
        while status != DONE:
            status = _count_pretokens(
                data, stop, self._pattern, self._specials, self._table, self._pool, self._work, state
            )
            if status == FULL:
                self.grow()
            elif status == INVALID:
                return int(state[PROBLEM])
        return None

    @property
    def num_pretokens(self) -> int:
        """The number of distinct pre-tokens."""
        return int(self._state[ENTRIES])

    def pretokens(self) -> PretokenCounts:
        """All distinct pre-tokens with their counts, in no order."""
        key1s = self._table[1::SLOT_LENGTH]
        is_long_ = key1s >> np.uint64(LENGTH_SHIFT) == LONG
        lengths = np.where(is_long_, key1s & np.uint64((1 << LENGTH_SHIFT) - 1), key1s >> np.uint64(LENGTH_SHIFT))
        num_pretokens, num_bytes = int(self._state[ENTRIES]), int(lengths.sum())
        data = np.empty(num_bytes + 16, np.uint8)
        pretokens = PretokenCounts(data, np.empty(num_pretokens + 1, np.int64), np.empty(num_pretokens, np.int64))
        _write_pretokens(self._table, self._pool, *pretokens)
        return pretokens._replace(data=data[:num_bytes])

    def grow(self) -> None:
        """Make the array that is too small four times as large."""
        if (self._state[ENTRIES] + BLOCK) * 2 * SLOT_LENGTH > len(self._table):
            larger = new_table(len(self._table) // SLOT_LENGTH * 4)
            rehash(self._table, larger)
            self._table = larger
        else:
            self._pool = np.pad(self._pool, (0, 3 * len(self._pool)))


@kernel
def _first_eight_bytes(data, starts, keys):
    """The first eight bytes of each pre-token as a big-endian number, filled with zeros."""
    for n in range(len(keys)):
        start = starts[n]
        length = min(starts[n + 1] - start, 8)
        key = U64(0)
        for i in range(length):
            key = (key << U64(8)) | U64(data[start + i])
        keys[n] = key << U64(8 * (8 - length))


@kernel
def _sift_down(data, starts, order, first, i, size):
    """Restore the max-heap order[first : first + size] after its entry i has changed."""
    pretoken = order[first + i]
    while True:
        child = 2 * i + 1
        if child + 1 < size and compare_bytes(data, starts, order[first + child], order[first + child + 1]) < 0:
            child += 1
        if child >= size or compare_bytes(data, starts, pretoken, order[first + child]) >= 0:
            break
        order[first + i] = order[first + child]
        i = child
    order[first + i] = pretoken


@kernel
def _sort_equal_keys(data, starts, keys, order):
    """Sort pre-tokens with the same key by all their bytes: heapsort, which needs no memory and has no slow case."""
    first = 0
    while first < len(order):
        stop = first + 1
        while stop < len(order) and keys[order[stop]] == keys[order[first]]:
            stop += 1
        size = stop - first
        for i in range(size // 2 - 1, -1, -1):
            _sift_down(data, starts, order, first, i, size)
        for last in range(size - 1, 0, -1):
            order[first], order[first + last] = order[first + last], order[first]
            _sift_down(data, starts, order, first, 0, last)
        first = stop


@kernel
def _sum_equal(data, starts, counts, order, data_out, starts_out, counts_out):
    """Write the pre-tokens in order, equal ones once with the sum of their counts; returns their number."""
    n, offset_out = 0, 0
    for position in range(len(order)):
        pretoken = order[position]
        if position > 0 and compare_bytes(data, starts, order[position - 1], pretoken) == 0:
            counts_out[n - 1] += counts[pretoken]
            continue
        for i in range(starts[pretoken], starts[pretoken + 1]):
            data_out[offset_out] = data[i]
            offset_out += 1
        counts_out[n] = counts[pretoken]
        n += 1
        starts_out[n] = offset_out
    return n


def sort_and_sum(pretokens: PretokenCounts) -> PretokenCounts:
    """Sort pre-tokens by their bytes; equal ones become one with the sum of their counts."""
    data = readonly(pretokens.data)
    keys = np.empty(len(pretokens.counts), np.uint64)
    _first_eight_bytes(data, pretokens.starts, keys)
    order = np.argsort(keys)
    _sort_equal_keys(data, pretokens.starts, keys, order)
    out = PretokenCounts(*map(np.empty_like, pretokens))
    out.starts[0] = 0
    n = _sum_equal(data, pretokens.starts, pretokens.counts, order, *out)
    return PretokenCounts(out.data[: out.starts[n]], out.starts[: n + 1], out.counts[:n])
