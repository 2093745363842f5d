"""Find special tokens: the leftmost, and of those that start at the same position the longest.

The tokens are a tree: an edge leads from a node (a beginning of tokens) over a byte to another. The edges are in one
hash table, whose key is the node and the byte. So ten thousand tokens cost about as much as ten: a position whose bytes
begin no token is passed over without the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from basic.bpe.kernels.hash_table import MULTIPLIER
from basic.bpe.kernels.instructions import U64, load8, trailing_zeros
from basic.common.native.kernel import kernel

_MAX_FIRST_BYTES = 4  # up to so many distinct first bytes are searched by comparing eight bytes at once
_NO_EDGE = -1
SHORT, LONG = 2, 1  # bits; LONG is that of `_has_bit`
_NUMBER_BITS = 18
_NUM_BITS = 1 << _NUMBER_BITS


class SpecialTokenTables(NamedTuple):
    """Special tokens for the kernels.

    Attributes:
        first_bytes: the distinct first bytes of the tokens, if they are few (uint8).
        first_pairs: for each pair of bytes, low byte first, whether they begin a token: no, SHORT if it has less than
            four bytes, or LONG (uint8). Empty if there are no tokens.
        beginnings: the bits of the numbers of the four bytes that begin a long token, then of the six bytes, or of the
            four if it has less than six (uint64). Other bytes may have the same number.
        edges: hash table with two numbers a slot: node * 256 + byte or -1, and the next node (int64).
        ends: for each node the number of the token that ends there, or -1 (int64).
    """

    first_bytes: np.ndarray
    first_pairs: np.ndarray
    beginnings: np.ndarray
    edges: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray


def special_token_tables(tokens: Sequence[bytes], ids: Sequence[int] | None = None) -> SpecialTokenTables:
    """Make the tables."""
    next_nodes: dict[int, int] = {}
    ends = [-1]
    first_pairs = np.zeros((256, 256) if tokens else 0, np.uint8)
    long_tokens = [token for token in tokens if len(token) >= 4]
    beginnings = np.zeros((2, _NUM_BITS // 64), np.uint64)
    for bits, length in zip(beginnings, (4, 6), strict=True):
        sizes = [length if len(token) >= length else 4 for token in long_tokens]
        firsts = [int.from_bytes(token[:n], "little") for token, n in zip(long_tokens, sizes, strict=True)]
        _set_bits(bits, np.array(firsts, np.uint64))
    for number, token in enumerate(tokens):
        node = 0
        for byte in token:
            key = node << 8 | byte
            if key not in next_nodes:
                next_nodes[key] = len(ends)
                ends.append(-1)
            node = next_nodes[key]
        ends[node] = number
        second = token[1] if len(token) > 1 else slice(None)
        first_pairs[second, token[0]] |= LONG if len(token) >= 4 else SHORT
    first_bytes = np.array(sorted({token[0] for token in tokens}), np.uint8)
    edges = np.full((2 << max(4, len(next_nodes).bit_length()), 2), _NO_EDGE, np.int64)
    keys, nodes = np.array([*next_nodes], np.int64), np.array([*next_nodes.values()], np.int64)
    _fill_edges(edges, keys, nodes)
    return SpecialTokenTables(
        first_bytes if len(first_bytes) <= _MAX_FIRST_BYTES else first_bytes[:0],
        first_pairs.ravel(),
        beginnings,
        edges,
        np.array(ends, np.int64),
        np.array([len(token) for token in tokens], np.int64),
        np.array([0] * len(tokens) if ids is None else ids, np.int64),
    )


@kernel
def _number_of(first_bytes):
    return (first_bytes * MULTIPLIER) >> U64(64 - _NUMBER_BITS)


@kernel
def _set_bits(bits, firsts):
    for i in range(len(firsts)):
        number = _number_of(firsts[i])
        bits[number >> U64(6)] |= U64(1) << (number & U64(63))


@kernel
def _has_bit(beginnings, row, first_bytes):
    number = _number_of(first_bytes)
    return (beginnings[row, number >> U64(6)] >> (number & U64(63))) & U64(1)


@kernel
def _first_slot(edges, key):
    return (U64(key) * MULTIPLIER) >> (U64(64) - trailing_zeros(U64(len(edges))))


@kernel
def _fill_edges(edges, keys, nodes):
    for i in range(len(keys)):
        slot = _first_slot(edges, keys[i])
        while edges[slot, 0] != _NO_EDGE:
            slot = (slot + U64(1)) & U64(len(edges) - 1)
        edges[slot, 0], edges[slot, 1] = keys[i], nodes[i]


@kernel
def _longest_at(data, start, stop, edges, ends):
    """The number of the longest token at a position, or -1."""
    node, longest, i = 0, -1, start
    while i < stop:
        key = (node << 8) | data[i]
        slot = _first_slot(edges, key)
        while edges[slot, 0] != key:
            if edges[slot, 0] == _NO_EDGE:
                return longest
            slot = (slot + U64(1)) & U64(len(edges) - 1)
        node = edges[slot, 1]
        if ends[node] >= 0:
            longest = ends[node]
        i += 1
    return longest


@kernel
def _equal_bytes(eight, byte):
    """The highest bit of each of eight bytes that equals `byte`; bits above the lowest one found may be wrong."""
    difference = eight ^ (U64(byte) * U64(0x0101010101010101))
    return (difference - U64(0x0101010101010101)) & ~difference & U64(0x8080808080808080)


@kernel
def _next_first_byte(data, start, stop, first_bytes):
    """The next position of one of the first bytes, or one of the last 8 positions."""
    i = start
    while i + 8 <= stop:
        if i + 32 <= stop:
            u, matches = U64(i), U64(0)
            for first in first_bytes:
                matches |= _equal_bytes(load8(data, u), first) | _equal_bytes(load8(data, u + U64(8)), first)
                matches |= _equal_bytes(load8(data, u + U64(16)), first) | _equal_bytes(load8(data, u + U64(24)), first)
            if matches == U64(0):
                i += 32
                continue
        matches = U64(0)
        for first in first_bytes:
            matches |= _equal_bytes(load8(data, U64(i)), first)
        if matches != U64(0):
            return i + np.int64(trailing_zeros(matches) >> U64(3))
        i += 8
    return i


@kernel
def _next_beginning(data, start, stop, first_pairs, beginnings):
    """The next position of bytes that can begin a token, or one of the last 8 positions."""
    i = start
    while i + 8 <= stop:
        eight = load8(data, U64(i))
        for k in range(U64(5)):
            # One branch for the pair and the four bytes: among many words, neither is rare enough to be predicted.
            bytes_from_k = eight >> (U64(8) * k)
            four = bytes_from_k & U64(0xFFFFFFFF)
            allowed = U64(SHORT) | _has_bit(beginnings, 0, four)
            if U64(first_pairs[bytes_from_k & U64(0xFFFF)]) & allowed:
                position = i + np.int64(k)
                if position + 8 > stop or first_pairs[bytes_from_k & U64(0xFFFF)] >= SHORT:
                    return position
                # Most words begin like one of many; a step in the tree costs more than these bits.
                six = load8(data, U64(position)) & U64(0xFFFFFFFFFFFF)
                if _has_bit(beginnings, 1, six) | _has_bit(beginnings, 1, four):
                    return position
        i += 5
    return i


@kernel
def find_special(data, start, stop, specials):
    """Find the next special token.

    Returns:
        Its offset and its number; `stop` and -1 if there is none.
    """
    first_bytes, first_pairs, beginnings, edges, ends, _, _ = specials
    if len(first_pairs) == 0:
        return stop, -1
    i = start
    while i < stop:
        if len(first_bytes) > 0:
            i = _next_first_byte(data, i, stop, first_bytes)
        else:
            i = _next_beginning(data, i, stop, first_pairs, beginnings)
        if i < stop:
            number = _longest_at(data, i, stop, edges, ends)
            if number >= 0:
                return i, number
        i += 1
    return stop, -1
