"""The hash table of pre-tokens, in flat arrays; counting and encoding find a pre-token in one lookup.

A slot is four uint64, half a cache line, so a hit is one access to memory:

    key 0, key 1        the pre-token: its first 15 bytes, and its length in the highest byte
    value 0, value 1    the count of the pre-token, or its ids

So a pre-token of at most 15 bytes is its own key, and a comparison compares two numbers. In English almost all
pre-tokens are this short. For a longer one, key 0 is a hash, and key 1 is the length with LONG in the highest byte. Its
bytes are in a pool, eight by eight, where they are compared.

Kernels do not allocate memory. A kernel that needs more returns FULL; the caller allocates and calls it again.
"""

from __future__ import annotations

import numpy as np

from basic.bpe.kernels.instructions import U64, load8, prefetch, trailing_zeros
from basic.bpe.kernels.scan import BEFORE
from basic.common.native.kernel import inlined_kernel, kernel

I64 = np.int64

DONE, FULL, INVALID = 0, 1, 2  # return values of kernels
# Indices in the state of a kernel (int64): the offset in the text, used slots and pool elements, ids written, the
# amount of memory that it needs or the offset of an invalid byte, and calls for a string.
POSITION, ENTRIES, POOL_USED, WRITTEN, PROBLEM, CALLS = 0, 1, 2, 3, 4, 5
STATE_LENGTH = 8

SLOT_LENGTH = 4
SHORT_BYTES = 15
LENGTH_SHIFT = 56
LONG = 0xFE
# In the keys of a block, long pre-tokens have this bit inverted. So the quick comparison with a slot fails for them,
# and the slow path compares their bytes.
_LONG_BLOCK_BIT = 1 << LENGTH_SHIFT

EMPTY = U64(0xFFFFFFFFFFFFFFFF)  # a free slot of the tables that have other keys than pre-tokens
MULTIPLIER = U64(0x9E3779B97F4A7C15)  # a multiplication spreads the low bits into the high bits
_MULTIPLIER_1 = U64(0xD6E8FEB86659FD93)


def new_table(num_slots: int) -> np.ndarray:
    """An empty table; the number of slots must be a power of two. No slot crosses a cache line."""
    return aligned_zeros(num_slots * SLOT_LENGTH)


def aligned_zeros(length: int) -> np.ndarray:
    """Zeros (uint64) from the start of a cache line on.

    Many are aligned to 2 MB, so that Linux can use huge pages for them (NumPy requests them): 5 % faster.
    """
    alignment = 1 << 18 if length >= 1 << 18 else 8
    memory = np.zeros(length + alignment, np.uint64)
    first = (-memory.ctypes.data // 8) % alignment
    return memory[first : first + length]


def new_keys(length: int) -> np.ndarray:
    """Arrays for key 0, key 1 and the first slot of this number of pre-tokens."""
    return np.zeros((3, length), np.uint64)


@kernel
def first_slot(key0, key1, table):
    """The slot where the search for a key starts: the highest bits of a product, which depend on all its bits."""
    bits = trailing_zeros(U64(len(table)) // U64(SLOT_LENGTH))
    return ((key0 ^ (key1 * _MULTIPLIER_1)) * MULTIPLIER) >> (U64(64) - bits)


@kernel
def _eight_bytes_of_long(data, start, length, i):
    """The i-th eight bytes of a pre-token of more than eight bytes; the last eight end with the pre-token, so they may
    overlap the eight before."""
    return load8(data, U64(start) + min(U64(8) * U64(i), U64(length) - U64(8)))


@kernel
def hash_of_long(data, start, length):
    mixed = U64(length)
    for i in range((length + 7) // 8):
        mixed = (mixed ^ _eight_bytes_of_long(data, start, length, i)) * MULTIPLIER
        mixed ^= mixed >> U64(29)
    return mixed


@kernel
def key1_of_long(length):
    return U64(length) | (U64(LONG) << U64(LENGTH_SHIFT))


@kernel
def is_long(key1):
    return key1 >> U64(LENGTH_SHIFT) == U64(LONG)


@inlined_kernel
def key1_in_table(key1):
    """Convert key 1 of a block to key 1 of the table."""
    if key1 >> U64(LENGTH_SHIFT) > U64(LONG):
        key1 ^= U64(_LONG_BLOCK_BIT)
    return key1


@kernel
def block_keys(text, starts, num_pretokens, table, keys):
    """Compute the keys of all pre-tokens of a block, and their first slots.

    This is done before the first lookup, so that the slots are fetched from memory while other keys are computed.

    Args:
        text: the block (see `scan_block`).
        starts: the offset at which each pre-token starts, and the end of the last one.
    """
    key0s, key1s, slots = keys[0], keys[1], keys[2]
    start = U64(starts[0])
    for j in range(U64(num_pretokens)):
        stop = U64(starts[j + U64(1)])
        length, at = stop - start, start + U64(BEFORE)
        if length <= U64(SHORT_BYTES):
            in_key0 = min(length, U64(8))
            key0 = load8(text, at) & (U64(0xFFFFFFFFFFFFFFFF) >> (U64(64) - U64(8) * in_key0))
            key1 = load8(text, at + U64(8)) & ((U64(1) << (U64(8) * (length - in_key0))) - U64(1))
            key1 |= length << U64(LENGTH_SHIFT)
            slot = first_slot(key0, key1, table)
        else:
            key0, key1 = hash_of_long(text, I64(at), I64(length)), key1_of_long(length)
            slot = first_slot(key0, key1, table)
            key1 ^= U64(_LONG_BLOCK_BIT)
        key0s[j], key1s[j], slots[j] = key0, key1, slot
        prefetch(table, slot * U64(SLOT_LENGTH))
        start = stop


@kernel
def in_pool(data, start, length, pool, offset):
    """Whether the bytes of a long pre-token equal those in the pool at an offset."""
    for i in range((length + 7) // 8):  # noqa: SIM110, which Numba cannot compile
        if pool[offset + i] != _eight_bytes_of_long(data, start, length, i):
            return False
    return True


@kernel
def put_in_pool(data, start, length, pool, offset):
    """Write the bytes of a long pre-token to the pool; returns the offset after them."""
    for i in range((length + 7) // 8):
        pool[offset + i] = _eight_bytes_of_long(data, start, length, i)
    return offset + (length + 7) // 8


@kernel
def find_slot(data, start, length, key0, key1, slot, table, pool, shift):
    """The index in the table of a pre-token's slot, or of the empty slot where it belongs.

    Args:
        slot: the first one.
        shift: value 1 has the offset in the pool of a long pre-token above so many bits.
    """
    while True:
        base = slot * U64(SLOT_LENGTH)
        if table[base + U64(1)] == U64(0):
            return base
        is_equal = table[base] == key0 and table[base + U64(1)] == key1
        if is_equal and (not is_long(key1) or in_pool(data, start, length, pool, I64(table[base + U64(3)] >> shift))):
            return base
        slot = (slot + U64(1)) & U64(len(table) // SLOT_LENGTH - 1)


# The tokens that a pre-token may become at once are such a table too, with their ids as value 0.


@inlined_kernel
def _keys_of(data, start, length):
    """Both keys of one pre-token."""
    if length > SHORT_BYTES:
        return hash_of_long(data, start, length), key1_of_long(length)
    key0, key1 = U64(0), U64(length) << U64(LENGTH_SHIFT)
    for i in range(min(length, 8)):
        key0 |= U64(data[start + i]) << U64(8 * i)
    for i in range(8, length):
        key1 |= U64(data[start + i]) << U64(8 * (i - 8))
    return key0, key1


@inlined_kernel
def prefetch_whole(key0, key1, tokens):
    """Fetch from memory what `find_whole` will read."""
    if len(tokens[0]) > 0:
        prefetch(tokens[0], first_slot(key0, key1, tokens[0]) * U64(SLOT_LENGTH))


@kernel
def find_whole(data, start, length, key0, key1, tokens):
    """The id of the token that has the bytes of a pre-token, or -1."""
    table, pool = tokens
    if len(table) == 0:
        return I64(-1)
    base = find_slot(data, start, length, key0, key1, first_slot(key0, key1, table), table, pool, U64(0))
    return I64(table[base + U64(2)]) if table[base + U64(1)] != U64(0) else I64(-1)


@kernel
def find_whole_bytes(data, start, length, tokens):
    """`find_whole` without the keys."""
    key0, key1 = _keys_of(data, start, length)
    return find_whole(data, start, length, key0, key1, tokens)


@kernel
def _add_whole_tokens(data, starts, ids, table, pool):
    used = 0
    for i in range(len(ids)):
        start, length = starts[i], starts[i + 1] - starts[i]
        key0, key1 = _keys_of(data, start, length)
        base = find_slot(data, start, length, key0, key1, first_slot(key0, key1, table), table, pool, U64(0))
        table[base], table[base + U64(1)] = key0, key1
        table[base + U64(2)], table[base + U64(3)] = U64(ids[i]), U64(used)
        if is_long(key1):
            used = put_in_pool(data, start, length, pool, used)


def whole_token_table(data: np.ndarray, starts: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hash table of tokens for `find_whole`, and its pool; without tokens, nothing is found.

    Args:
        data: the bytes of all tokens, read-only; none is empty.
        starts: the offset of each token, and the end of the last one (int64).
    """
    if len(ids) == 0:
        return aligned_zeros(0), aligned_zeros(0)
    lengths = np.diff(starts)
    pool = aligned_zeros(int(((lengths[lengths > SHORT_BYTES] + 7) // 8).sum()))
    table = new_table(1 << (len(ids) * 5 // 4 + 1).bit_length())
    _add_whole_tokens(data, starts, ids, table, pool)
    return table, pool


@kernel
def rehash(table, larger):
    """Copy all slots to a larger, empty table, each to the slot that its keys give."""
    for old in range(U64(0), U64(len(table)), U64(SLOT_LENGTH)):
        if table[old + U64(1)] == U64(0):
            continue
        slot = first_slot(table[old], table[old + U64(1)], larger)
        while larger[slot * U64(SLOT_LENGTH) + U64(1)] != U64(0):
            slot = (slot + U64(1)) & U64(len(larger) // SLOT_LENGTH - 1)
        for k in range(U64(SLOT_LENGTH)):
            larger[slot * U64(SLOT_LENGTH) + k] = table[old + k]


@kernel
def compare_bytes(data, starts, x, y):
    """Negative, 0 or positive if the bytes of the x-th item are smaller than, equal to or greater than the y-th's."""
    start_x, start_y = starts[x], starts[y]
    size_x, size_y = starts[x + 1] - start_x, starts[y + 1] - start_y
    for i in range(min(size_x, size_y)):
        difference = I64(data[start_x + i]) - I64(data[start_y + i])
        if difference != 0:
            return difference
    return size_x - size_y
