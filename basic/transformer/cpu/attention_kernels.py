"""Attention on a CPU: kernels that compute it head by head, in matrices that stay in the caches of a core.

B sequences · T tokens · H heads of queries · D features of a head
"""

from __future__ import annotations

import numpy as np

from basic.common.native.instructions import TILE_COLUMNS, TILE_ROWS, add_product, larger, take_items
from basic.transformer.cpu.kernels import F32, LN_2, exp2, inlined, kernel

QUERIES = 32
"""Queries of a head that are computed together, with all keys up to the last one's; a multiple of TILE_ROWS."""
ALIGNED = 32
"""Kernels read the scores of a query from and up to multiples of this, which is one of TILE_COLUMNS: a loop over any
other number of them would end with up to 31 single steps."""


@inlined
def rotate(from_, to, cos, sin, direction, factor):
    """Rotate a head by its angles, if there are any, and multiply it by a factor; `to` may be `from_`.

    Args:
        direction: 1; or -1 for the rotation back, which is that of the gradient.
    """
    for pair in range(len(cos)):
        x, y, c, s = from_[2 * pair] * factor, from_[2 * pair + 1] * factor, cos[pair], sin[pair] * direction
        to[2 * pair] = x * c - y * s
        to[2 * pair + 1] = x * s + y * c
    if len(cos) == 0:
        for i in range(min(len(from_), len(to))):
            to[i] = from_[i] * factor


@inlined
def _multiply(a, b, c, rows, inner, columns, keeps):
    """c[:rows, :columns] = a[:rows, :inner] b[:inner, :columns], added to c if `keeps` is not 0; in whole tiles."""
    for j in range(0, columns, TILE_COLUMNS):
        for i in range(0, rows, TILE_ROWS):
            add_product(a[i:], b[:, j:], c[i:, j:], inner, keeps)


@inlined
def _load(qkv, b, head, num_keys, cos, sin, keys, values):
    """Copy a head of keys, rotated, and one of values."""
    for t in range(qkv.shape[1]):
        value = qkv[b, t, head + num_keys]
        rotate(qkv[b, t, head], keys[t], cos[t], sin[t], F32(1), F32(1))
        for i in range(len(value)):
            values[t, i] = value[i]


@inlined
def _transpose(from_, to, rows):
    for t in range(rows):
        for i in range(len(to)):
            to[i, t] = from_[t, i]


@inlined
def _bounds(first, last, window):
    """Those of the keys that some of the queries from first to last, of which the last is none, attend to."""
    start = max(0, first - window + 1) if window else 0
    return start - start % ALIGNED, last + -last % ALIGNED


@inlined
def _mask(row, query, start, stop, window, first_token):
    """Write -inf and 0 over the scores from start to stop that a query may not use; returns bounds of the others."""
    first, end = max(first_token, query - window + 1 if window else 0), query + 1
    low, high = first - first % ALIGNED, end + -end % ALIGNED
    row[start:low] = row[high:stop] = F32(0)
    row[low:first] = row[end:high] = F32(-np.inf)
    return low, high


@kernel
def attention_forward(counter, parts, qkv, cos, sin, scale, window, starts, memory, o, log_sums):
    """Causal attention; a thread takes a head of keys with the heads of queries that share it, or a part of these.

    Args:
        counter: [0, 0]; the second one counts the threads.
        parts: of the queries of a head, which several threads may take.
        qkv: (B, T, queries + keys + values, D).
        cos, sin: (T, D / 2); or (T, 0) for no rotation.
        scale: of the queries, such that scores are logarithms to the base of 2.
        window: number of tokens that one attends to; 0 for all before it.
        starts: (B, T), the first token of each token's document; or (B, 0).
        memory: four arrays of zeros, with one matrix for each thread and what `attention_backward` needs of that kind.
        o: (B, T, H, D).
        log_sums: (B, H, T), of the scores, for the gradients.
    """
    B, T, H, D = o.shape
    num_keys = (qkv.shape[2] - H) // 2
    thread = take_items(counter[1:], 1)
    heads, by_feature, scores, rows = memory[0][thread], memory[1][thread], memory[2][thread], memory[3][thread]
    keys, values, keys_by_feature, weights, q, out = heads[0], heads[1], by_feature[0], scores[0], rows[0], rows[1]
    while True:
        item = take_items(counter, 1)
        if item >= B * num_keys * parts:
            return
        part, head, b = item % parts, item // parts % num_keys, item // parts // num_keys
        _load(qkv, b, H + head, num_keys, cos, sin, keys, values)
        _transpose(keys, keys_by_feature, T)
        for h in range(head * H // num_keys, (head + 1) * H // num_keys):
            for first in range(part * QUERIES, T, parts * QUERIES):
                last = min(first + QUERIES, T)
                start, stop = _bounds(first, last, window)
                for t in range(first, last):
                    rotate(qkv[b, t, h], q[t - first], cos[t], sin[t], F32(1), F32(scale))
                _multiply(q, keys_by_feature[:, start:], weights[:, start:], last - first, D, stop - start, 0)
                for t in range(first, last):
                    first_token = starts[b, t] if starts.shape[1] else 0
                    low, high = _mask(weights[t - first], t, start, stop, window, first_token)
                    row, maximum, total = weights[t - first, low:high], weights[t - first, low], F32(0)
                    for j in range(len(row)):
                        maximum = larger(maximum, row[j])
                    for j in range(len(row)):
                        power = exp2(row[j] - maximum)
                        row[j] = power
                        total += power
                    factor = F32(1) / total
                    for j in range(len(row)):
                        row[j] *= factor
                    log_sums[b, h, t] = maximum + np.log2(total)
                _multiply(weights[:, start:], values[start:], out, last - first, stop - start, D, 0)
                for t in range(first, last):
                    for i in range(D):
                        o[b, t, h, i] = out[t - first, i]


@kernel
def attention_backward(counter, qkv, cos, sin, scale, window, starts, memory, o, log_sums, do, dqkv):
    """The gradient of `attention_forward`; a thread takes a head of keys with the heads of queries that share it.

    Source: Dao et al. 2022, "FlashAttention", algorithm 4, with all keys of a query in one tile.
    """
    B, T, H, D = o.shape
    num_keys = (qkv.shape[2] - H) // 2
    thread = take_items(counter[1:], 1)
    heads, by_feature, scores, rows = memory[0][thread], memory[1][thread], memory[2][thread], memory[3][thread]
    keys, values, dkeys, dvalues = heads[0], heads[1], heads[2], heads[3]
    weights, slopes, q, dq, dout = scores[0], scores[1], rows[0], rows[1], rows[2]
    while True:
        item = take_items(counter, 1)
        if item >= B * num_keys:
            return
        b, head = item // num_keys, item % num_keys
        _load(qkv, b, H + head, num_keys, cos, sin, keys, values)
        _transpose(keys, by_feature[0], T)
        _transpose(values, by_feature[1], T)
        dkeys[:] = dvalues[:] = F32(0)
        for h in range(head * H // num_keys, (head + 1) * H // num_keys):
            for first in range(0, T, QUERIES):
                last = min(first + QUERIES, T)
                start, stop = _bounds(first, last, window)
                for t in range(first, last):
                    rotate(qkv[b, t, h], q[t - first], cos[t], sin[t], F32(1), F32(scale))
                    for i in range(D):
                        dout[t - first, i] = do[b, t, h, i]
                _multiply(q, by_feature[0, :, start:], weights[:, start:], last - first, D, stop - start, 0)
                _multiply(dout, by_feature[1, :, start:], slopes[:, start:], last - first, D, stop - start, 0)
                for t in range(first, last):
                    first_token = starts[b, t] if starts.shape[1] else 0
                    low, high = _mask(weights[t - first], t, start, stop, window, first_token)
                    slopes[t - first, start:low] = slopes[t - first, high:stop] = F32(0)
                    product = F32(0)
                    for i in range(D):
                        product += do[b, t, h, i] * o[b, t, h, i]
                    row, slope, log_sum = weights[t - first, low:high], slopes[t - first, low:high], log_sums[b, h, t]
                    for j in range(len(row)):
                        weight = exp2(row[j] - log_sum)
                        row[j] = weight
                        slope[j] = weight * (slope[j] - product)
                count = last - first
                _multiply(weights.T[start:], dout, dvalues[start:], stop - start, count, D, 1)
                _multiply(slopes.T[start:], q, dkeys[start:], stop - start, count, D, 1)
                _multiply(slopes[:, start:], keys[start:], dq, count, stop - start, D, 0)
                for t in range(first, last):
                    rotate(dq[t - first], dqkv[b, t, h], cos[t], sin[t], F32(-1), F32(scale) * LN_2)
        for t in range(T):
            rotate(dkeys[t], dqkv[b, t, H + head], cos[t], sin[t], F32(-1), LN_2)
            for i in range(D):
                dqkv[b, t, H + num_keys + head, i] = dvalues[t, i]
