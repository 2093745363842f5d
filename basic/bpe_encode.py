"""Encoding: scan, look the word up, copy its ids; merge only words that are new.

The table of words keeps up to eight bytes of ids inside the row, four ids of two bytes: a word that it knows costs one
access to memory and one store. More ids than that stand in the pool. New words are merged by a quadratic loop, which
nothing beats at their usual length, the long ones with a heap.

A `WordEncoder` belongs to one thread at a time, its table is a cache: it grows to a fixed size and is then emptied.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from basic.bpe_kernels import InvalidByteError
from basic.bpe_machine import U64, kernel, store8
from basic.bpe_scan import BLOCK, ROOM, end_of_long_word, find_special, learn_classes, new_scratch, scan_block
from basic.bpe_words import (
    DONE,
    ENTRIES,
    FULL,
    I64,
    LENGTH_SHIFT,
    LONG,
    LONG_DIFFERS,
    POOL_USED,
    POSITION,
    PROBLEM,
    ROW,
    STATE_LENGTH,
    WRITTEN,
    WRONG,
    block_keys,
    in_pool,
    is_long,
    new_keys,
    new_table,
    put_in_pool,
    rehash,
)

# More that the kernel can return: the ids have no room, a word is longer than the arrays for merging, or it has a byte
# that no token of the vocabulary is.
NO_ROOM_FOR_IDS, NO_ROOM_FOR_WORD, NO_BYTE = 3, 4, 5

# A row of the table of merges is one number: left id, right id, rank.
ID_BITS, RANK_BITS = 21, 22
_NO_RANK = 1 << RANK_BITS
_NO_ROW = U64(0xFFFFFFFFFFFFFFFF)
_ODD = U64(0x9E3779B97F4A7C15)

_QUADRATIC_BYTES = 256  # up to here the simple loop is faster
_CACHED_BYTES = 255  # longer words hardly ever come again
_MAX_ROWS, _MAX_POOL = 1 << 19, 1 << 21  # 16 MB each
_SLACK = BLOCK + 16  # ids that a block may write, and those written beyond the last one
SMALL_BYTES = 1 << 13


class Merges(NamedTuple):
    """The merges of a tokenizer as arrays.

    Attributes:
        byte_ids: the id of each byte, -1 without one (int32).
        rows: hash table of left id, right id and rank (uint64).
        results: the id that each merge makes, by rank (int32).
        byte_ranks: of each pair of bytes, the first times 256 (int32), which takes no hash.
    """

    byte_ids: np.ndarray
    rows: np.ndarray
    results: np.ndarray
    byte_ranks: np.ndarray


@kernel
def _rank(rows, left, right):
    """The rank of the merge of two ids, _NO_RANK without one."""
    key = (U64(left) << U64(ID_BITS)) | U64(right)
    mask = U64(len(rows) - 1)
    slot = ((key * _ODD) >> U64(36)) & mask
    while rows[slot] != _NO_ROW:
        if rows[slot] >> U64(RANK_BITS) == key:
            return I64(rows[slot] & U64(_NO_RANK - 1))
        slot = (slot + U64(1)) & mask
    return I64(_NO_RANK)


@kernel
def _fill_rows(rows, lefts, rights, ranks):
    mask = U64(len(rows) - 1)
    for i in range(len(ranks)):
        key = (U64(lefts[i]) << U64(ID_BITS)) | U64(rights[i])
        slot = ((key * _ODD) >> U64(36)) & mask
        while rows[slot] != _NO_ROW:
            slot = (slot + U64(1)) & mask
        rows[slot] = (key << U64(RANK_BITS)) | U64(ranks[i])


def merges_as_arrays(byte_ids: dict[int, int], ranks: dict[tuple[int, int], int], results: list[int]) -> Merges:
    """Put merges into arrays; all ids must be below 2**21 - 1 and there must be fewer than 2**22 merges."""
    rows = np.full(1 << max(4, (2 * len(ranks)).bit_length()), _NO_ROW)
    pairs = np.array(list(ranks), np.int64).reshape(-1, 2)
    _fill_rows(rows, pairs[:, 0].copy(), pairs[:, 1].copy(), np.array(list(ranks.values()), np.int64))
    ids = np.full(256, -1, np.int32)
    ids[list(byte_ids)] = list(byte_ids.values())
    byte_ranks = np.full((256, 256), _NO_RANK, np.int32)
    bytes_of = {token_id: byte for byte, token_id in byte_ids.items()}
    for (left, right), rank in ranks.items():
        if left in bytes_of and right in bytes_of:
            byte_ranks[bytes_of[left], bytes_of[right]] = rank
    return Merges(ids, rows, np.array(results, np.int32), byte_ranks.reshape(-1))


@kernel
def _merge_short(data, start, length, merges, symbols, ranks, long_work):
    """Merge the symbols of a word: the earliest merge wherever it can be, from left to right, again and again.

    Symbols stay where they are; the rank of a pair stands at its left one. So the search for the smallest rank is a
    loop over an array that the compiler turns into vector instructions.

    Returns:
        How many ids are left; -1 where a merge makes a pair of an earlier rank, which would have to wait until the
        present rank is through, as it never happens with merges that were learned.
    """
    rows, results, byte_ranks = merges[1], merges[2], merges[3]
    left_of, right_of = long_work[0], long_work[1]
    for i in range(length - 1):
        ranks[i] = byte_ranks[(U64(data[start + i]) << U64(8)) | U64(data[start + i + 1])]
    ranks[length - 1] = _NO_RANK
    for i in range(length):
        left_of[i], right_of[i] = i - 1, i + 1
    while True:
        best = np.int32(_NO_RANK)
        for i in range(length):
            best = min(best, ranks[i])
        if best == _NO_RANK:
            break
        i = 0
        while ranks[i] != best:
            i += 1
        right = right_of[i]
        after, before = right_of[right], left_of[i]
        symbols[i], symbols[right] = results[best], -1
        ranks[i] = ranks[right] = _NO_RANK
        right_of[i] = after
        if after < length:
            left_of[after] = i
            rank = _rank(rows, symbols[i], symbols[after])
            if rank < best:
                return -1
            ranks[i] = rank
        if before >= 0:
            rank = _rank(rows, symbols[before], symbols[i])
            if rank < best:
                return -1
            ranks[before] = rank
    return _remaining(symbols, length)


@kernel
def _remaining(symbols, length):
    """Move the ids that are left to the front."""
    n = 0
    for i in range(length):
        if symbols[i] >= 0:
            symbols[n] = symbols[i]
            n += 1
    return n


@kernel
def _heap_push(heap, size, value):
    i = size
    while i > 0 and heap[(i - 1) // 2] > value:
        heap[i] = heap[(i - 1) // 2]
        i = (i - 1) // 2
    heap[i] = value


@kernel
def _heap_pop(heap, size):
    """Take the smallest value off; the heap has one fewer then."""
    smallest, last, i = heap[0], heap[size - 1], 0
    while True:
        child = 2 * i + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if child >= size or heap[child] >= last:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = last
    return smallest


@kernel
def _merge_long(length, merges, symbols, long_work):
    """The same in time that hardly grows faster than the word: pairs wait in a heap by rank, then place.

    All places of a rank are taken off before the first is merged, since its neighbours may form a pair of an earlier
    rank, which has to wait. A place where the pair is no more is passed over.
    """
    rows, results = merges[1], merges[2]
    left_of, right_of, batch, heap = long_work
    size = 0
    for i in range(length):
        left_of[i], right_of[i] = i - 1, i + 1
        if i + 1 < length:
            rank = _rank(rows, symbols[i], symbols[i + 1])
            if rank < _NO_RANK:
                _heap_push(heap, size, (rank << 40) | i)
                size += 1
    while size > 0:
        rank, n = heap[0] >> 40, 0
        while size > 0 and heap[0] >> 40 == rank:
            batch[n] = _heap_pop(heap, size) & ((1 << 40) - 1)
            size -= 1
            n += 1
        for k in range(n):
            i = batch[k]
            right = right_of[i]
            if symbols[i] < 0 or right >= length or _rank(rows, symbols[i], symbols[right]) != rank:
                continue
            symbols[i], symbols[right] = results[rank], -1
            after = right_of[right]
            right_of[i] = after
            if after < length:
                left_of[after] = i
                new_rank = _rank(rows, symbols[i], symbols[after])
                if new_rank < _NO_RANK:
                    _heap_push(heap, size, (new_rank << 40) | i)
                    size += 1
            before = left_of[i]
            if before >= 0:
                new_rank = _rank(rows, symbols[before], symbols[i])
                if new_rank < _NO_RANK:
                    _heap_push(heap, size, (new_rank << 40) | before)
                    size += 1
    return _remaining(symbols, length)


@kernel
def _merge_word(data, start, length, merges, work, state):
    """Leave the ids of a word in the symbols; returns how many, -1 where the vocabulary lacks a byte."""
    symbols, ranks, long_work = work[3], work[4], work[5]
    if not _bytes_to_ids(data, start, length, merges, symbols, state):
        return -1
    if length <= _QUADRATIC_BYTES:
        count = _merge_short(data, start, length, merges, symbols, ranks, long_work)
        if count >= 0:
            return count
        _bytes_to_ids(data, start, length, merges, symbols, state)
    return _merge_long(length, merges, symbols, long_work)


@kernel
def _bytes_to_ids(data, start, length, merges, symbols, state):
    for i in range(length):
        symbols[i] = merges[0][data[start + i]]
        if symbols[i] < 0:
            state[PROBLEM] = start + i
            return False
    return True


@kernel
def _packed(symbols, first, stop, id_bytes):
    """Ids from `first` on, as many as go into eight bytes."""
    value = U64(0)
    for i in range(first, min(stop, first + 8 // id_bytes)):
        value |= U64(symbols[i]) << U64(8 * id_bytes * (i - first))
    return value


@kernel
def _write_ids(symbols, count, out, written, id_bytes):
    for i in range(count):  # of eight bytes the next id overwrites those that are not of this one
        store8(out, U64(written + i * id_bytes), U64(symbols[i]))


@kernel
def _find(data, start, length, key0, key1, row, table, pool):
    """The row of a word, or the empty row where it would stand."""
    mask = U64(len(table) // ROW - 1)
    while True:
        r = row * U64(ROW)
        if table[r + U64(1)] == U64(0):
            return row
        if table[r] == key0 and table[r + U64(1)] == key1:
            if not is_long(key1):
                return row
            size, offset = table[r + U64(3)] & U64(0xFFFF), table[r + U64(3)] >> U64(16)
            # The bytes of a long word stand behind its ids, where these are not in the row.
            if in_pool(
                data, start, length, pool, I64(offset + (((size + U64(7)) >> U64(3)) if size > U64(8) else U64(0)))
            ):
                return row
        row = (row + U64(1)) & mask


@kernel
def _add_word(data, start, length, key0, key1, row, table, pool, merges, work, out, id_bytes, state):
    """Merge a new word, write its ids, and put it in its row; returns the bytes of its ids, -1 for a missing byte."""
    written = state[WRITTEN]
    count = _merge_word(data, start, length, merges, work, state)
    if count < 0:
        return -1
    symbols, size = work[3], count * id_bytes
    _write_ids(symbols, count, out, written, id_bytes)
    if length <= _CACHED_BYTES:
        r, offset, used = row * U64(ROW), state[POOL_USED], state[POOL_USED]
        if size > 8:
            for i in range(0, count, 8 // id_bytes):
                pool[used] = _packed(symbols, i, count, id_bytes)
                used += 1
        if is_long(key1):
            used = put_in_pool(data, start, length, pool, used)
        table[r], table[r + U64(1)], table[r + U64(2)] = key0, key1, _packed(symbols, 0, count, id_bytes)
        table[r + U64(3)] = U64(size) | (U64(offset) << U64(16))
        state[POOL_USED] = used
        state[ENTRIES] += 1
    return size


@kernel
def _encode(data, stop, code_classes, specials, table, pool, merges, work, out, id_bytes, state):
    """Encode from state[POSITION] to `stop`, writing from byte state[WRITTEN] on. Returns why it stopped.

    The ids have `id_bytes` bytes; their sizes and places are in bytes, so that the same code writes both kinds.
    """
    scratch, places, keys = work[0], work[1], work[2]
    key0s, key1s, rows = keys
    special_data, special_starts, first_bytes, special_ids = specials
    position = state[POSITION]
    while position < stop:
        segment_stop, special = find_special(data, position, stop, special_data, special_starts, first_bytes)
        while position < segment_stop:
            state[POSITION] = position
            if (state[ENTRIES] + BLOCK) * 2 * ROW > len(table) or state[POOL_USED] + BLOCK > len(pool):
                return FULL
            state[PROBLEM] = 0
            if state[WRITTEN] + _SLACK * id_bytes > len(out):
                return NO_ROOM_FOR_IDS
            num_words, wrong = scan_block(data, position, segment_stop, code_classes, scratch, places)
            if wrong >= 0:
                state[PROBLEM] = position + wrong
                return WRONG
            if num_words == 0:
                end = end_of_long_word(data, position, segment_stop, code_classes)
                if end < 0:
                    state[PROBLEM] = -1 - end
                    return WRONG
                state[PROBLEM] = end - position
                if end - position > len(work[3]):
                    return NO_ROOM_FOR_WORD
                if state[WRITTEN] + (end - position + _SLACK) * id_bytes > len(out):
                    return NO_ROOM_FOR_IDS
                count = _merge_word(data, position, end - position, merges, work, state)
                if count < 0:
                    return NO_BYTE
                _write_ids(work[3], count, out, state[WRITTEN], id_bytes)
                state[WRITTEN] += count * id_bytes
                position = end
                continue
            block_keys(scratch[0], places, num_words, table, keys)
            written = U64(state[WRITTEN])
            for j in range(U64(num_words)):
                r = rows[j] * U64(ROW)
                # Written before it is known to be right: nearly always it is, and the store need not wait.
                store8(out, written, table[r + U64(2)])
                if ((table[r] ^ key0s[j]) | (table[r + U64(1)] ^ key1s[j])) != U64(0):
                    key1 = key1s[j]
                    if key1 >> U64(LENGTH_SHIFT) > U64(LONG):
                        key1 ^= U64(LONG_DIFFERS)
                    start, length = position + places[j], places[j + U64(1)] - places[j]
                    row = _find(data, start, length, key0s[j], key1, rows[j], table, pool)
                    r = row * U64(ROW)
                    if table[r + U64(1)] == U64(0):
                        state[WRITTEN] = I64(written)
                        new_size = _add_word(
                            data, start, length, key0s[j], key1, row, table, pool, merges, work, out, id_bytes, state
                        )
                        if new_size < 0:
                            return NO_BYTE
                        written += U64(new_size)
                        continue
                    store8(out, written, table[r + U64(2)])
                size = table[r + U64(3)] & U64(0xFFFF)
                if size > U64(8):
                    offset = table[r + U64(3)] >> U64(16)
                    for i in range(U64(1), (size + U64(7)) >> U64(3)):
                        store8(out, written + U64(8) * i, pool[offset + i])
                written += size
            state[WRITTEN] = I64(written)
            position += places[num_words]
        if special >= 0:
            if state[WRITTEN] + _SLACK * id_bytes > len(out):
                state[POSITION], state[PROBLEM] = position, 0
                return NO_ROOM_FOR_IDS
            store8(out, U64(state[WRITTEN]), U64(special_ids[special]))
            state[WRITTEN] += id_bytes
            position += special_starts[special + 1] - special_starts[special]
    state[POSITION] = position
    return DONE


class WordEncoder:
    """Encodes for one thread at a time, and remembers words.

    Args:
        code_classes: of `bpe_scan.new_classes`; may be shared.
        merges: may be shared.
        dtype: of the ids, uint16 or uint32.
    """

    def __init__(self, code_classes: np.ndarray, merges: Merges, dtype: np.dtype) -> None:
        self._code_classes, self._merges, self._dtype = code_classes, merges, dtype
        # Begun at 2 MB: a table that has to grow from a quarter of that makes new words take twice as long.
        self._table, self._pool = new_table(1 << 16), np.zeros(1 << 14, np.uint64)
        self._state = np.zeros(STATE_LENGTH, np.int64)
        self._small = np.empty((SMALL_BYTES + _SLACK) * dtype.itemsize, np.uint8)
        self._scan_work = (new_scratch(), np.zeros(ROOM, np.int64), new_keys(ROOM))
        self._merge_room(ROOM)

    def _merge_room(self, length: int) -> None:
        """Make room to merge words of this length."""
        symbols, ranks, left_of, right_of = (np.empty(length, np.int32) for _ in range(4))
        batch, heap = np.empty(length, np.int64), np.empty(3 * length, np.int64)
        self._work = (*self._scan_work, symbols, ranks, (left_of, right_of, batch, heap))

    def encode(self, data: np.ndarray, start: int, stop: int, specials: tuple[np.ndarray, ...]) -> np.ndarray:
        """The ids of data[start:stop], which must begin and end where words do.

        Args:
            data: read-only uint8.
            specials: of `bpe_kernels.special_arrays`, and the ids.

        Returns:
            An array, which the next call overwrites if the text is at most `SMALL_BYTES` long.

        Raises:
            InvalidByteError: the text is not UTF-8, or needs a byte that the vocabulary lacks.
        """
        is_small = stop - start <= SMALL_BYTES
        id_bytes = self._dtype.itemsize
        out = self._small if is_small else np.empty(((stop - start) // 3 + 2 * _SLACK) * id_bytes, np.uint8)
        state = self._state
        state[POSITION], state[WRITTEN] = start, 0
        while (
            status := _encode(
                data, stop, self._code_classes, specials,
                self._table, self._pool, self._merges, self._work, out, id_bytes, state,
            )
        ) != DONE:  # fmt: skip
            if status == FULL:
                self.grow()
            elif status == NO_ROOM_FOR_IDS:
                # What is written so far says how much more there will be; a long word may need all its bytes.
                written, done = int(state[WRITTEN]), int(state[POSITION]) - start
                estimate = written * (stop - start) // max(done, 1) * 9 // 8
                # In place where the system can remap pages, so that nothing is copied.
                estimate = max(estimate, written + int(state[PROBLEM]) * id_bytes) + 2 * _SLACK * id_bytes
                out.resize(estimate, refcheck=False)
            elif status == NO_ROOM_FOR_WORD:
                self._merge_room(int(state[PROBLEM]))
            elif status == NO_BYTE or not learn_classes(self._code_classes, data, int(state[PROBLEM])):
                raise InvalidByteError(int(state[PROBLEM]), status == NO_BYTE)
        if len(self._work[3]) > ROOM:
            self._merge_room(ROOM)
        written = int(state[WRITTEN])
        if is_small:
            return out[:written].view(self._dtype)
        out.resize(written, refcheck=False)
        return out.view(self._dtype)

    def grow(self) -> None:
        """Twice the room for what has too little, up to the limit; then forget all words."""
        table_is_full = (int(self._state[ENTRIES]) + BLOCK) * 2 * ROW > len(self._table)
        if table_is_full and len(self._table) < _MAX_ROWS * ROW:
            larger = new_table(len(self._table) // ROW * 2)
            rehash(self._table, larger)
            self._table = larger
        elif not table_is_full and len(self._pool) < _MAX_POOL:
            pool = np.zeros(len(self._pool) * 4, np.uint64)
            pool[: len(self._pool)] = self._pool
            self._pool = pool
        else:
            self._table[:] = 0
            self._state[ENTRIES] = self._state[POOL_USED] = 0
