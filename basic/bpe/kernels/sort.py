"""Sort pre-tokens by their bytes, and sum the counts of equal ones; so the counts of many shards become one table.

The first eight bytes of each pre-token, as a number, are sorted by NumPy, which uses vector instructions. The few
pre-tokens with the same first eight bytes are then sorted by all their bytes. A million pre-tokens take a tenth of a
second.
"""

from __future__ import annotations

import numpy as np

from basic.bpe.arrays import PretokenCounts
from basic.bpe.kernels.hash_table import I64
from basic.bpe.kernels.instructions import U64, kernel, readonly


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
def _compare(data, starts, x, y):
    """Negative, 0 or positive if pre-token x is smaller than, equal to or greater than pre-token y."""
    start_x, start_y = starts[x], starts[y]
    size_x, size_y = starts[x + 1] - start_x, starts[y + 1] - start_y
    for i in range(min(size_x, size_y)):
        difference = I64(data[start_x + i]) - I64(data[start_y + i])
        if difference != 0:
            return difference
    return size_x - size_y


@kernel
def _sift_down(data, starts, order, first, i, size):
    """Restore the max-heap order[first : first + size] after its entry i has changed."""
    pretoken = order[first + i]
    while True:
        child = 2 * i + 1
        if child + 1 < size and _compare(data, starts, order[first + child], order[first + child + 1]) < 0:
            child += 1
        if child >= size or _compare(data, starts, pretoken, order[first + child]) >= 0:
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
        if position > 0 and _compare(data, starts, order[position - 1], pretoken) == 0:
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
    data_out, starts_out, counts_out = (
        np.empty_like(pretokens.data),
        np.zeros_like(pretokens.starts),
        np.empty_like(pretokens.counts),
    )
    n = _sum_equal(data, pretokens.starts, pretokens.counts, order, data_out, starts_out, counts_out)
    return PretokenCounts(data_out[: starts_out[n]], starts_out[: n + 1], counts_out[:n])
