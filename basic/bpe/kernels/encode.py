"""Encoding: scan, look the word up, copy its ids; merge only words that are new.

The table of words keeps up to eight bytes of ids inside the row, four ids of two bytes: a word that it knows costs one
access to memory and one store. More ids than that stand in the pool. The new words of a block are merged side by side
(`bpe_apply`), before any of them is written.

A `PretokenEncoder` belongs to one thread at a time, its table is a cache: it grows to a fixed size and is then emptied.
"""

from __future__ import annotations

import numpy as np

from basic.bpe.arrays import InvalidByteError
from basic.bpe.kernels.apply_merges import (
    SIMPLE_BYTES,
    STEP,
    Merges,
    begin_word,
    bytes_to_ids,
    merge_all,
    merge_once,
    new_room,
    remaining,
)
from basic.bpe.kernels.hash_table import (
    ENTRIES,
    I64,
    POOL_USED,
    POSITION,
    PROBLEM,
    ROW,
    STATE_LENGTH,
    WRITTEN,
    block_keys,
    in_pool,
    is_long,
    key1_in_table,
    new_keys,
    new_table,
    put_in_pool,
    rehash,
)
from basic.bpe.kernels.instructions import U64, kernel, store8
from basic.bpe.kernels.scan import BLOCK, ROOM, end_of_long_word, find_special, learn_classes, new_scratch, scan_block

# Why the kernel stops before it is done: it has no room in the table or its pool, for ids, or to merge a long word; or
# there is a byte that is not UTF-8 or whose class is not known, or one that no token of the vocabulary is.
_FULL, _NO_ROOM_FOR_IDS, _NO_ROOM_FOR_WORD, _WRONG, _NO_BYTE = -1, -2, -3, -4, -5

# Value 1 of a row: how many bytes the ids of the word have, and where ids and the bytes of a long word begin in the
# pool, if they are there.
_SIZE_BITS, _OFFSET_BITS = 16, 24
_SIZE, _OFFSET = U64((1 << _SIZE_BITS) - 1), U64((1 << _OFFSET_BITS) - 1)

_MAX_ROWS, _MAX_POOL = 1 << 19, 1 << 21  # 16 MB each
_SLACK = BLOCK + 16  # ids that a block may write, and those written beyond the last one
_MERGE_ROOM = STEP * BLOCK + BLOCK  # for all words of a block, each in whole steps, and one that is not kept
SMALL_BYTES = 1 << 13


@kernel
def _find(data, start, length, key0, key1, row, table, pool):
    """Where the row of a word begins, or the empty row where it would stand."""
    while True:
        r = row * U64(ROW)
        if table[r + U64(1)] == U64(0):
            return r
        if table[r] == key0 and table[r + U64(1)] == key1:
            if not is_long(key1):
                return r
            if in_pool(data, start, length, pool, I64(table[r + U64(3)] >> U64(_SIZE_BITS + _OFFSET_BITS))):
                return r
        row = (row + U64(1)) & U64(len(table) // ROW - 1)


@kernel
def _packed(symbols, first, stop, id_bytes):
    """Ids from `first` on, as many as go into eight bytes."""
    value, shift = U64(0), U64(0)
    for i in range(first, min(stop, first + 8 // id_bytes)):
        value |= U64(symbols[i]) << shift
        shift += U64(8 * id_bytes)
    return value


@kernel
def _store_ids(symbols, first, count, r, table, pool, id_bytes, state):
    """Put the ids of a word into its row, and into the pool if they are more than eight bytes."""
    size, stop, used = count * id_bytes, first + count, state[POOL_USED]
    table[r + U64(2)] = _packed(symbols, first, stop, id_bytes)
    table[r + U64(3)] |= U64(size) | (U64(used) << U64(_SIZE_BITS))
    if size > 8:
        for i in range(first, stop, 8 // id_bytes):
            pool[used] = _packed(symbols, i, stop, id_bytes)
            used += 1
        state[POOL_USED] = used


@kernel
def _learn_words(data, position, j, num_words, places, keys, table, pool, merges, room, news, id_bytes, state):
    """Put the new words of a block, from the j-th on, into the table, with their ids.

    Their rows are taken first, so that of equal words one is merged; then they get a merge each, round after round.

    Returns:
        Whether all their bytes have ids; else state[PROBLEM] is the first place of one that has none, and the table
        must not be used again.
    """
    key0s, key1s, rows = keys[0], keys[1], keys[2]
    new_rows, starts, lengths, firsts, waiting = news[0], news[1], news[2], news[3], news[4]
    symbols = room[0][0]
    num_new, first = 0, 0
    for k in range(j, U64(num_words)):
        r = rows[k] * U64(ROW)
        if ((table[r] ^ key0s[k]) | (table[r + U64(1)] ^ key1s[k])) == U64(0):
            continue
        key1 = key1_in_table(key1s[k])
        start, length = position + places[k], places[k + U64(1)] - places[k]
        r = _find(data, start, length, key0s[k], key1, rows[k], table, pool)
        if table[r + U64(1)] != U64(0):
            continue
        missing = bytes_to_ids(data, start, length, merges, symbols, first)
        if missing >= 0:
            state[PROBLEM] = missing
            return False
        if length > SIMPLE_BYTES:
            continue
        table[r], table[r + U64(1)] = key0s[k], key1
        table[r + U64(3)] = U64(state[POOL_USED]) << U64(_SIZE_BITS + _OFFSET_BITS)
        if is_long(key1):
            state[POOL_USED] = put_in_pool(data, start, length, pool, state[POOL_USED])
        state[ENTRIES] += 1
        new_rows[num_new], starts[num_new], lengths[num_new], firsts[num_new] = r, start, length, first
        waiting[num_new] = num_new
        first = begin_word(data, start, length, merges, room, first)
        num_new += 1
    num_waiting = num_new
    while num_waiting > 0:
        still = 0
        for w in range(num_waiting):
            word = waiting[w]
            merged = merge_once(lengths[word], merges, room, firsts[word])
            if merged > 0:
                waiting[still] = word
                still += 1
            elif merged < 0:
                lengths[word] = -lengths[word]  # needs the heap, when the room is free
        num_waiting = still
    for word in range(num_new):
        if lengths[word] > 0:
            count = remaining(symbols, firsts[word], lengths[word])
            _store_ids(symbols, firsts[word], count, U64(new_rows[word]), table, pool, id_bytes, state)
    for word in range(num_new):
        if lengths[word] < 0:
            bytes_to_ids(data, starts[word], -lengths[word], merges, symbols, 0)
            count = merge_all(-lengths[word], merges, room)
            _store_ids(symbols, 0, count, U64(new_rows[word]), table, pool, id_bytes, state)
    return True


@kernel
def _write_long_word(data, start, length, merges, room, out, id_bytes, state):
    """Merge a word that is not kept, and write its ids at byte state[WRITTEN]; False where a byte has none."""
    symbols, written = room[0][0], U64(state[WRITTEN])
    missing = bytes_to_ids(data, start, length, merges, symbols, 0)
    if missing >= 0:
        state[PROBLEM] = missing
        return False
    count = merge_all(length, merges, room)
    for i in range(count):  # of eight bytes the next id overwrites those that are not of this one
        store8(out, written, U64(symbols[i]))
        written += U64(id_bytes)
    state[WRITTEN] = I64(written)
    return True


@kernel
def _encode(
    data, stop, code_classes, special_data, special_starts, first_bytes, special_ids, table, pool, rows_of_merges,
    numbers, scratch, places, keys, news, room_of_symbols, heap, out, id_bytes, state, start
):  # fmt: skip
    """Encode from `start` to `stop`, writing to `out`; where `start` is negative, go on where the last call stopped.

    Returns:
        The bytes of all ids when it is done, else why it stopped, which is negative.

    The ids have `id_bytes` bytes; their sizes and places are in bytes, so that the same code writes both kinds.
    """
    merges, room = (rows_of_merges, numbers), (room_of_symbols, heap)
    key0s, key1s, rows = keys[0], keys[1], keys[2]
    if start >= 0:
        state[POSITION], state[WRITTEN] = start, 0
    position = state[POSITION]
    while position < stop:
        segment_stop, special = find_special(data, position, stop, special_data, special_starts, first_bytes)
        while position < segment_stop:
            state[POSITION] = position
            if (state[ENTRIES] + BLOCK) * 2 * ROW > len(table) or state[POOL_USED] + BLOCK > len(pool):
                return _FULL
            state[PROBLEM] = 0
            if state[WRITTEN] + _SLACK * id_bytes > len(out):
                return _NO_ROOM_FOR_IDS
            num_words, wrong = scan_block(data, position, segment_stop, code_classes, scratch, places)
            if wrong >= 0:
                state[PROBLEM] = position + wrong
                return _WRONG
            if num_words == 0:
                end = end_of_long_word(data, position, segment_stop, code_classes)
                if end < 0:
                    state[PROBLEM] = -1 - end
                    return _WRONG
                state[PROBLEM] = end - position
                if end - position > len(room[1]) // 4:
                    return _NO_ROOM_FOR_WORD
                if state[WRITTEN] + (end - position + _SLACK) * id_bytes > len(out):
                    return _NO_ROOM_FOR_IDS
                if not _write_long_word(data, position, end - position, merges, room, out, id_bytes, state):
                    return _NO_BYTE
                position = end
                continue
            block_keys(scratch[0], places, num_words, table, keys)
            written = U64(state[WRITTEN])
            for j in range(U64(num_words)):
                r = rows[j] * U64(ROW)
                # Written before it is known to be right: nearly always it is, and the store need not wait.
                store8(out, written, table[r + U64(2)])
                if ((table[r] ^ key0s[j]) | (table[r + U64(1)] ^ key1s[j])) != U64(0):
                    key1 = key1_in_table(key1s[j])
                    start, length = position + places[j], places[j + U64(1)] - places[j]
                    r = _find(data, start, length, key0s[j], key1, rows[j], table, pool)
                    if table[r + U64(1)] == U64(0):
                        if length > SIMPLE_BYTES:
                            state[WRITTEN] = I64(written)
                            if not _write_long_word(data, start, length, merges, room, out, id_bytes, state):
                                return _NO_BYTE
                            written = U64(state[WRITTEN])
                            continue
                        if not _learn_words(
                            data, position, j, num_words, places, keys, table, pool, merges, room, news, id_bytes, state
                        ):
                            return _NO_BYTE
                    store8(out, written, table[r + U64(2)])
                size = table[r + U64(3)] & _SIZE
                if size > U64(8):
                    offset = (table[r + U64(3)] >> U64(_SIZE_BITS)) & _OFFSET
                    for i in range(U64(1), (size + U64(7)) >> U64(3)):
                        store8(out, written + U64(8) * i, pool[offset + i])
                written += size
            state[WRITTEN] = I64(written)
            position += places[num_words]
        if special >= 0:
            if state[WRITTEN] + _SLACK * id_bytes > len(out):
                state[POSITION], state[PROBLEM] = position, 0
                return _NO_ROOM_FOR_IDS
            store8(out, U64(state[WRITTEN]), U64(special_ids[special]))
            state[WRITTEN] += id_bytes
            position += special_starts[special + 1] - special_starts[special]
    state[POSITION] = position
    return state[WRITTEN]


class PretokenEncoder:
    """Encodes for one thread at a time, and remembers words.

    Args:
        code_classes: of `bpe_scan.new_classes`; may be shared.
        merges: may be shared.
        dtype: of the ids, uint16 or uint32.
    """

    def __init__(self, code_classes: np.ndarray, merges: Merges, dtype: np.dtype) -> None:
        self._code_classes, self._merges, self._dtype = code_classes, merges, dtype
        # Begun at 4 MB, and so hardly ever grown: a growing table makes a new word take up to twice as long.
        self._table, self._pool = new_table(1 << 17), np.zeros(1 << 14, np.uint64)
        self._state = np.zeros(STATE_LENGTH, np.int64)
        self._small_ids = np.empty(SMALL_BYTES + _SLACK, dtype)
        self._small = self._small_ids.view(np.uint8)
        self._work = (new_scratch(), np.zeros(ROOM, np.int64), new_keys(ROOM), np.zeros((5, BLOCK), np.int64))
        self._room = new_room(_MERGE_ROOM)

    def encode(self, data: np.ndarray, start: int, stop: int, specials: tuple[np.ndarray, ...]) -> np.ndarray:
        """The ids of data[start:stop], which must begin and end where words do.

        Args:
            data: read-only uint8.
            specials: of `bpe_kernels.special_token_arrays`, and the ids.

        Returns:
            An array, which the next call overwrites if the text is at most `SMALL_BYTES` long.

        Raises:
            InvalidByteError: the text is not UTF-8, or needs a byte that the vocabulary lacks.
        """
        is_small = stop - start <= SMALL_BYTES
        state, id_bytes = self._state, self._dtype.itemsize
        out = self._small if is_small else np.empty(((stop - start) // 3 + 2 * _SLACK) * id_bytes, np.uint8)
        room, begin = self._room, start
        while (
            status := _encode(
                data, stop, self._code_classes, *specials, self._table, self._pool, *self._merges,
                *self._work, *room, out, id_bytes, state, begin,
            )
        ) < 0:  # fmt: skip
            begin = -1
            if status == _FULL:
                self.grow()
            elif status == _NO_ROOM_FOR_IDS:
                # What is written so far says how much more there will be; a long word may need all its bytes.
                written, done = int(state[WRITTEN]), int(state[POSITION]) - start
                estimate = written * (stop - start) // max(done, 1) * 9 // 8
                # In place where the system can remap pages, so that nothing is copied.
                estimate = max(estimate, written + int(state[PROBLEM]) * id_bytes) + 2 * _SLACK * id_bytes
                out.resize(estimate, refcheck=False)
            elif status == _NO_ROOM_FOR_WORD:
                room = new_room(int(state[PROBLEM]))  # for this text alone
            elif status == _NO_BYTE:
                self._forget()
                raise InvalidByteError(int(state[PROBLEM]), lacks_token=True)
            elif not learn_classes(self._code_classes, data, int(state[PROBLEM])):
                raise InvalidByteError(int(state[PROBLEM]))
        if is_small:
            return self._small_ids[: status // id_bytes]
        out.resize(status, refcheck=False)
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
            self._forget()

    def _forget(self) -> None:
        self._table[:] = 0
        self._state[ENTRIES] = self._state[POOL_USED] = 0
