"""The table of words: a hash table in flat arrays, in which counting and encoding find a word with one look.

A row is four uint64, half a cache line, so that a hit costs one access to memory:

    key 0, key 1        the word: its first 15 bytes, and its length in the highest byte
    value 0, value 1    what the table is for: the count of the word, or its ids

So a word of at most 15 bytes is its own key, and comparing it is comparing two numbers; in English that is nearly
all of the words. Of a longer word key 0 is a hash, key 1 the length with LONG in the highest byte, and the bytes
stand in a pool, eight by eight, where they are compared.

Kernels do not allocate. One that lacks room says so (FULL); its caller makes more and calls it again.
"""

from __future__ import annotations

import numpy as np

from basic.bpe.kernels.instructions import U64, inlined_kernel, kernel, load8, prefetch, trailing_zeros
from basic.bpe.kernels.scan import BEFORE

I64 = np.int64

DONE, FULL, WRONG = 0, 1, 2  # what kernels return
# Places in the state of a kernel, an int64 array: how far it came, rows and pool in use, ids written, what it lacks or
# which byte is wrong.
POSITION, ENTRIES, POOL_USED, WRITTEN, PROBLEM = 0, 1, 2, 3, 4
STATE_LENGTH = 8

ROW = 4
SHORT_BYTES = 15
LENGTH_SHIFT = 56
LONG = 0xFE
# Long words look different in the keys of a block and in the table. So the quick comparison never takes two for
# equal, and the slow path compares their bytes.
LONG_DIFFERS = 1 << LENGTH_SHIFT

_ODD = U64(0x9E3779B97F4A7C15)  # multiplied, a number's low bits spread into the high ones
_ODD_TOO = U64(0xD6E8FEB86659FD93)


def new_table(rows: int) -> np.ndarray:
    """An empty table; the number of rows must be a power of two. No row lies across two cache lines.

    A large one begins where a page of 2 MB can, which NumPy asks Linux for: fewer addresses to translate, 5 % faster.
    """
    alignment = 1 << 18 if rows * ROW >= 1 << 18 else 8
    room = np.zeros(rows * ROW + alignment, np.uint64)
    first = (-room.ctypes.data // 8) % alignment
    return room[first : first + rows * ROW]


def new_keys(length: int) -> np.ndarray:
    """Room for key 0, key 1 and the first row to look in of as many words, a row of the array for each."""
    return np.zeros((3, length), np.uint64)


@kernel
def first_row(key0, key1, table):
    """The number of the row in which a search begins: the highest bits of a product, which depend on all bits."""
    bits = trailing_zeros(U64(len(table)) // U64(ROW))
    return ((key0 ^ (key1 * _ODD_TOO)) * _ODD) >> (U64(64) - bits)


@kernel
def eight_of_long(data, start, length, i):
    """The i-th eight bytes of a word of more than eight; the last eight overlap those before, never the word's end."""
    return load8(data, U64(start) + min(U64(8) * U64(i), U64(length) - U64(8)))


@kernel
def hash_of_long(data, start, length):
    mixed = U64(length)
    for i in range((length + 7) // 8):
        mixed = (mixed ^ eight_of_long(data, start, length, i)) * _ODD
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
    """Key 1 as it stands in the table, from that of a block."""
    if key1 >> U64(LENGTH_SHIFT) > U64(LONG):
        key1 ^= U64(LONG_DIFFERS)
    return key1


@kernel
def block_keys(text, places, num_words, table, keys):
    """The keys of the words of a block, and the first row to look in.

    All of them before the first look: the rows are then on their way from memory while other keys are made.
    """
    key0s, key1s, rows = keys[0], keys[1], keys[2]
    start = U64(places[0])
    for j in range(U64(num_words)):
        stop = U64(places[j + U64(1)])
        length, at = stop - start, start + U64(BEFORE)
        if length <= U64(SHORT_BYTES):
            in_key0 = min(length, U64(8))
            key0 = load8(text, at) & (U64(0xFFFFFFFFFFFFFFFF) >> (U64(64) - U64(8) * in_key0))
            key1 = load8(text, at + U64(8)) & ((U64(1) << (U64(8) * (length - in_key0))) - U64(1))
            key1 |= length << U64(LENGTH_SHIFT)
            row = first_row(key0, key1, table)
        else:
            key0, key1 = hash_of_long(text, I64(at), I64(length)), key1_of_long(length)
            row = first_row(key0, key1, table)
            key1 ^= U64(LONG_DIFFERS)
        key0s[j], key1s[j], rows[j] = key0, key1, row
        prefetch(table, row * U64(ROW))
        start = stop


@kernel
def in_pool(data, start, length, pool, offset):
    """Whether a long word is the one whose bytes stand in the pool from an offset on."""
    for i in range((length + 7) // 8):  # noqa: SIM110, which Numba cannot compile
        if pool[offset + i] != eight_of_long(data, start, length, i):
            return False
    return True


@kernel
def put_in_pool(data, start, length, pool, offset):
    """Write the bytes of a long word to the pool; returns the offset behind them."""
    for i in range((length + 7) // 8):
        pool[offset + i] = eight_of_long(data, start, length, i)
    return offset + (length + 7) // 8


@kernel
def rehash(table, larger):
    """Copy all rows to a larger, empty table. The keys say where to."""
    for old in range(U64(0), U64(len(table)), U64(ROW)):
        if table[old + U64(1)] == U64(0):
            continue
        row = first_row(table[old], table[old + U64(1)], larger)
        while larger[row * U64(ROW) + U64(1)] != U64(0):
            row = (row + U64(1)) & U64(len(larger) // ROW - 1)
        for k in range(U64(ROW)):
            larger[row * U64(ROW) + k] = table[old + k]
