"""Encode: scan, look the pre-token up, copy its ids; merge only new pre-tokens.

A slot of the hash table holds up to eight bytes of ids, four ids of two bytes. So a known pre-token costs one access to
memory and one store. More ids are in the pool. The new pre-tokens of a block are merged together
(`kernels/merges/apply_merges.py`) before any of their ids is written.

`kernels/encoders.py` calls it.
"""

from __future__ import annotations

import numpy as np

from basic.bpe.kernels.hash_table import (
    CALLS,
    ENTRIES,
    I64,
    POOL_USED,
    POSITION,
    PROBLEM,
    SLOT_LENGTH,
    WRITTEN,
    block_keys,
    find_slot,
    find_whole,
    find_whole_bytes,
    is_long,
    key1_in_table,
    new_keys,
    prefetch_whole,
    put_in_pool,
)
from basic.bpe.kernels.instructions import (
    U64,
    address_of,
    bytes_at,
    new_integer,
    new_list,
    release,
    set_list_item,
    store8,
    string_as_utf8,
    string_length,
)
from basic.bpe.kernels.merges.apply_merges import (
    MAX_SCANNED_BYTES,
    STEP,
    bytes_to_ids,
    compact_ids,
    merge_all,
    merge_once,
    start_pretoken,
)
from basic.bpe.kernels.scan import BLOCK, SCRATCH_LENGTH, Scratch, end_of_long_pretoken, new_scratch, scan_block
from basic.bpe.kernels.special_tokens import find_special
from basic.common.native.kernel import kernel

# Why the kernel stops before the end: the table or its pool, the output, or the buffers for a long pre-token are too
# small; a character is not UTF-8; or a byte has no token.
FULL, OUTPUT_FULL, BUFFERS_FULL, _INVALID, NO_TOKEN = -1, -2, -3, -4, -5
LONG_TEXT, INTERRUPTED = -6, -7  # the string is too long; another call came between

# Value 1 of a slot: the size of the ids in bytes, and the offsets in the pool of the ids and of the bytes of a long
# pre-token, if they are there.
_SIZE_BITS, _OFFSET_BITS = 16, 24
_SIZE, _OFFSET = U64((1 << _SIZE_BITS) - 1), U64((1 << _OFFSET_BITS) - 1)
_POOL_SHIFT = U64(_SIZE_BITS + _OFFSET_BITS)

MARGIN_IDS = BLOCK + 16  # the most ids of a block, and those that a store writes after the last one
# Holds all pre-tokens of a block, each filled up to a step, and one that is not kept.
BUFFER_LENGTH = STEP * BLOCK + BLOCK
SMALL_BYTES = 1 << 13


@kernel
def _packed(symbols, first, stop, id_bytes):
    """The ids from `first` on, as many as fit eight bytes, in one number."""
    value, shift = U64(0), U64(0)
    for i in range(first, min(stop, first + 8 // id_bytes)):
        value |= U64(symbols[i]) << shift
        shift += U64(8 * id_bytes)
    return value


@kernel
def _store_ids(symbols, first, count, base, table, pool, id_bytes, state):
    """Write the ids of a pre-token to its slot, and to the pool if they have more than eight bytes."""
    size, stop, used = count * id_bytes, first + count, state[POOL_USED]
    table[base + U64(2)] = _packed(symbols, first, stop, id_bytes)
    table[base + U64(3)] |= U64(size) | (U64(used) << U64(_SIZE_BITS))
    if size > 8:
        for i in range(first, stop, 8 // id_bytes):
            pool[used] = _packed(symbols, i, stop, id_bytes)
            used += 1
        state[POOL_USED] = used


@kernel
def _add_pretokens(data, position, j, num_pretokens, starts, keys, table, pool, merges, buffers, work, id_bytes, state):
    """Add the new pre-tokens of a block, from the j-th on, to the table, with their ids.

    All slots are taken first, so that equal pre-tokens are merged once. Then each new pre-token gets one merge a round.

    Returns:
        Whether all bytes have tokens. If not, state[PROBLEM] is the offset of the first one without, and the table must
        not be used again.
    """
    key0s, key1s, slots = keys[0], keys[1], keys[2]
    new_slots, new_starts, new_lengths, first_symbols, waiting = work[0], work[1], work[2], work[3], work[4]
    symbols = buffers[0][0]
    num_new, first, num_unknown = 0, 0, 0
    for k in range(j, U64(num_pretokens)):
        base = slots[k] * U64(SLOT_LENGTH)
        if ((table[base] ^ key0s[k]) | (table[base + U64(1)] ^ key1s[k])) != U64(0):
            waiting[num_unknown] = k
            num_unknown += 1
            prefetch_whole(key0s[k], key1_in_table(key1s[k]), merges[2])
    for unknown in range(num_unknown):
        k = U64(waiting[unknown])
        key1 = key1_in_table(key1s[k])
        start, length = position + starts[k], starts[k + U64(1)] - starts[k]
        base = find_slot(data, start, length, key0s[k], key1, slots[k], table, pool, _POOL_SHIFT)
        if table[base + U64(1)] != U64(0):
            continue
        whole = find_whole(data, start, length, key0s[k], key1, merges[2])
        if whole < 0:
            missing = bytes_to_ids(data, start, length, merges, symbols, first)
            if missing >= 0:
                state[PROBLEM] = missing
                return False
        if length > MAX_SCANNED_BYTES:
            continue
        table[base], table[base + U64(1)] = key0s[k], key1
        table[base + U64(3)] = U64(state[POOL_USED]) << _POOL_SHIFT
        if is_long(key1):
            state[POOL_USED] = put_in_pool(data, start, length, pool, state[POOL_USED])
        state[ENTRIES] += 1
        if whole >= 0:
            table[base + U64(2)] = U64(whole)
            table[base + U64(3)] |= U64(id_bytes)
            continue
        new_slots[num_new], new_starts[num_new] = base, start
        new_lengths[num_new], first_symbols[num_new] = length, first
        waiting[num_new] = num_new
        first = start_pretoken(data, start, length, merges, buffers, first)
        num_new += 1
    num_waiting = num_new
    while num_waiting > 0:
        num_left = 0
        for w in range(num_waiting):
            new = waiting[w]
            merged = merge_once(new_lengths[new], merges, buffers, first_symbols[new])
            if merged > 0:
                waiting[num_left] = new
                num_left += 1
            elif merged < 0:
                new_lengths[new] = -new_lengths[new]  # needs the heap, when the buffers are free
        num_waiting = num_left
    for new in range(num_new):
        if new_lengths[new] > 0:
            count = compact_ids(symbols, first_symbols[new], new_lengths[new])
            _store_ids(symbols, first_symbols[new], count, U64(new_slots[new]), table, pool, id_bytes, state)
    for new in range(num_new):
        if new_lengths[new] < 0:
            bytes_to_ids(data, new_starts[new], -new_lengths[new], merges, symbols, 0)
            count = merge_all(-new_lengths[new], merges, buffers)
            _store_ids(symbols, 0, count, U64(new_slots[new]), table, pool, id_bytes, state)
    return True


@kernel
def _write_long_pretoken(data, start, length, merges, buffers, out, id_bytes, state):
    """Merge a pre-token that is not kept, and write its ids at byte state[WRITTEN]; False if a byte has no token."""
    symbols, written = buffers[0][0], U64(state[WRITTEN])
    whole = find_whole_bytes(data, start, length, merges[2])
    if whole >= 0:
        store8(out, written, U64(whole))
        state[WRITTEN] += id_bytes
        return True
    missing = bytes_to_ids(data, start, length, merges, symbols, 0)
    if missing >= 0:
        state[PROBLEM] = missing
        return False
    count = merge_all(length, merges, buffers)
    for i in range(count):  # the next id overwrites the bytes that do not belong to this one
        store8(out, written, U64(symbols[i]))
        written += U64(id_bytes)
    state[WRITTEN] = I64(written)
    return True


@kernel
def _encode(
    data, stop, pattern, specials, table, pool, merge_slots, merge_numbers, whole_tokens, scratch, starts, keys, work,
    symbol_buffers, heap, out, id_bytes, state, start
):  # fmt: skip
    """Encode the text from `start` to `stop` to `out`; if `start` is negative, continue where the last call stopped.

    All sizes and offsets of ids are in bytes, so that the same code writes ids of two and of four bytes (`id_bytes`).

    Returns:
        The size of all ids in bytes, or a negative number: why it stopped.
    """
    merges, buffers = (merge_slots, merge_numbers, whole_tokens), (symbol_buffers, heap)
    key0s, key1s, slots = keys[0], keys[1], keys[2]
    if start >= 0:
        state[POSITION], state[WRITTEN] = start, 0
    position = state[POSITION]
    while position < stop:
        segment_stop, special = find_special(data, position, stop, specials)
        while position < segment_stop:
            state[POSITION] = position
            if (state[ENTRIES] + BLOCK) * 2 * SLOT_LENGTH > len(table) or state[POOL_USED] + BLOCK > len(pool):
                return FULL
            state[PROBLEM] = 0
            if state[WRITTEN] + MARGIN_IDS * id_bytes > len(out):
                return OUTPUT_FULL
            num_pretokens, invalid = scan_block(data, position, segment_stop, pattern, scratch, starts)
            if invalid >= 0:
                state[PROBLEM] = position + invalid
                return _INVALID
            if num_pretokens == 0:
                end = end_of_long_pretoken(data, position, segment_stop, pattern, starts)
                if end < 0:
                    state[PROBLEM] = -1 - end
                    return _INVALID
                state[PROBLEM] = end - position
                if end - position > len(buffers[1]) // 4:
                    return BUFFERS_FULL
                if state[WRITTEN] + (end - position + MARGIN_IDS) * id_bytes > len(out):
                    return OUTPUT_FULL
                if not _write_long_pretoken(data, position, end - position, merges, buffers, out, id_bytes, state):
                    return NO_TOKEN
                position = end
                continue
            block_keys(scratch[0][0], starts, num_pretokens, table, keys)
            written = U64(state[WRITTEN])
            for j in range(U64(num_pretokens)):
                base = slots[j] * U64(SLOT_LENGTH)
                # Store before the keys are compared: they are almost always equal, and the store need not wait.
                store8(out, written, table[base + U64(2)])
                if ((table[base] ^ key0s[j]) | (table[base + U64(1)] ^ key1s[j])) != U64(0):
                    key1 = key1_in_table(key1s[j])
                    start, length = position + starts[j], starts[j + U64(1)] - starts[j]
                    base = find_slot(data, start, length, key0s[j], key1, slots[j], table, pool, _POOL_SHIFT)
                    if table[base + U64(1)] == U64(0):
                        if length > MAX_SCANNED_BYTES:
                            state[WRITTEN] = I64(written)
                            if not _write_long_pretoken(data, start, length, merges, buffers, out, id_bytes, state):
                                return NO_TOKEN
                            written = U64(state[WRITTEN])
                            continue
                        if not _add_pretokens(
                            data, position, j, num_pretokens, starts, keys, table, pool, merges, buffers, work,
                            id_bytes, state,
                        ):  # fmt: skip
                            return NO_TOKEN
                    store8(out, written, table[base + U64(2)])
                size = table[base + U64(3)] & _SIZE
                if size > U64(8):
                    offset = (table[base + U64(3)] >> U64(_SIZE_BITS)) & _OFFSET
                    for i in range(U64(1), (size + U64(7)) >> U64(3)):
                        store8(out, written + U64(8) * i, pool[offset + i])
                written += size
            state[WRITTEN] = I64(written)
            position += starts[num_pretokens]
        if special >= 0:
            if state[WRITTEN] + MARGIN_IDS * id_bytes > len(out):
                state[POSITION], state[PROBLEM] = position, 0
                return OUTPUT_FULL
            store8(out, U64(state[WRITTEN]), U64(specials[6][special]))
            state[WRITTEN] += id_bytes
            position += specials[5][special]  # its length
    state[POSITION] = position
    return state[WRITTEN]


@kernel
def encode(
    text, num_bytes, short_ids, long_ids, data, stop, pattern, specials, table, pool, merge_slots, merge_numbers,
    whole_tokens, scratch, starts, keys, work, symbol_buffers, heap, out, id_bytes, state, start
):  # fmt: skip
    """`_encode` for bytes and, with a result that Python can use at once, for a string.

    Args:
        text: a Python string instead of `data`, or 0. It needs the interpreter's lock.
        num_bytes: one element, work memory for a string.
        short_ids, long_ids: `out` as uint16 and uint32, for a string.

    Returns:
        What `_encode` returns. For a string a list of ids; an int object, why it stopped; or 0 after an exception.
    """
    if text != 0:
        length = string_length(text)
        if length < 0:
            return 0
        if length > SMALL_BYTES:
            return new_integer(LONG_TEXT)
        address = string_as_utf8(text, address_of(num_bytes))
        if address == 0:
            return 0
        data, stop, start = bytes_at(address, num_bytes[0]), num_bytes[0], 0
        state[CALLS] += 1
    call = state[CALLS]
    written = _encode(
        data, stop, pattern, specials, table, pool, merge_slots,
        merge_numbers, whole_tokens, scratch, starts, keys, work, symbol_buffers, heap, out, id_bytes, state, start
    )  # fmt: skip
    if text == 0:
        return written
    if written == NO_TOKEN:
        table[:], state[ENTRIES], state[POOL_USED] = U64(0), 0, 0  # it may have entries without ids
    if written < 0:
        return new_integer(written)
    count = written // id_bytes
    result = new_list(count)
    if result != 0:
        # A new list can collect garbage, whose finalizers run Python code, here or in another thread.
        if state[CALLS] != call:
            release(result)
            return new_integer(INTERRUPTED)
        for i in range(count):
            set_list_item(result, i, new_integer(I64(short_ids[i]) if id_bytes == 2 else I64(long_ids[i])))
    return result


def new_work() -> tuple[Scratch, np.ndarray, np.ndarray, np.ndarray]:
    """The work memory of `encode`."""
    return new_scratch(), np.zeros(SCRATCH_LENGTH, np.int64), new_keys(SCRATCH_LENGTH), np.zeros((5, BLOCK), np.int64)


def for_string(out: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arguments of `encode` that only a string needs."""
    return np.zeros(1, np.int64), out.view(np.uint16), out.view(np.uint32)
