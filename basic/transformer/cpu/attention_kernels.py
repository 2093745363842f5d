"""Attention on a CPU: kernels that compute it head by head, in matrices that stay in the caches of a core.

B sequences · T tokens · H heads of queries · D features of a head
"""

from __future__ import annotations

import numpy as np

from basic.common.native.instructions import TILE_COLUMNS, TILE_ROWS, add_product, larger, take_items
from basic.transformer.cpu.kernels import F32, LN_2, exp2, inlined, kernel

QUERIES = 32
"""Queries of a head that are computed together, with all keys up to the last one's; a multiple of TILE_COLUMNS."""


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
def _own_memory(counter, memory):
    """The memory of one more thread."""
    thread = take_items(counter[1:], 1)
    return memory[0][thread], memory[1][thread], memory[2][thread], memory[3][thread], memory[4][thread]


@inlined
def _load(qkv, b, head, num_keys, cos, sin, keys, values):
    """Copy a head of keys, rotated, and one of values, and fill up with zeros: 0 times what is there may be NaN."""
    for t in range(qkv.shape[1]):
        value = qkv[b, t, head + num_keys]
        rotate(qkv[b, t, head], keys[t], cos[t], sin[t], F32(1), F32(1))
        for i in range(len(value)):
            values[t, i] = value[i]
    keys[qkv.shape[1] :] = values[qkv.shape[1] :] = F32(0)


@inlined
def _transpose(rows, count, columns):
    for t in range(count):
        for i in range(len(columns)):
            columns[i, t] = rows[t, i]


@inlined
def _scores(qkv, b, h, first, last, cos, sin, scale, window, starts, keys, q, by_feature, scores):
    """Compute the scores (keys, queries) of some queries, which are rotated and scaled; -inf for keys not attended to.

    Returns:
        The bounds of the keys that some of the queries attend to, multiples of TILE_ROWS.
    """
    for t in range(first, last):
        rotate(qkv[b, t, h], q[t - first], cos[t], sin[t], F32(1), F32(scale))
    _transpose(q, last - first, by_feature)
    start = max(0, first - window + 1) if window else 0
    start, stop = start - start % TILE_ROWS, last + -last % TILE_ROWS
    _multiply(keys[start:], by_feature, scores[start:], stop - start, qkv.shape[3], QUERIES, 0)
    for t in range(first, last):
        low = max(start, starts[b, t] if starts.shape[1] else 0, t - window + 1 if window else 0)
        scores[start:low, t - first] = scores[t + 1 : stop, t - first] = F32(-np.inf)
    return start, stop


@kernel
def attention_forward(counter, parts, qkv, cos, sin, scale, window, starts, memory, o, log_sums):
    """Causal attention; a thread takes a head of keys with the heads of queries that share it, or a part of these.

    Scores are stored by key: so vector code computes the softmax of many queries at once.

    Args:
        counter: [0, 0]; the second one counts the threads.
        parts: of the queries of a head, which several threads may take.
        qkv: (B, T, queries + keys + values, D).
        cos, sin: (T, D / 2); or (T, 0) for no rotation.
        scale: of the queries, such that scores are logarithms to the base of 2.
        window: number of tokens that one attends to; 0 for all before it.
        starts: (B, T), the first token of each token's document; or (B, 0).
        memory: for the matrices of a head, in each thread; see `operators._Heads.arguments`.
        o: (B, T, H, D).
        log_sums: (B, H, T), of the scores, for the gradients.
    """
    B, T, H, D = o.shape
    num_keys = (qkv.shape[2] - H) // 2
    heads, rows, by_feature, scores, sums = _own_memory(counter, memory)
    keys, values, q, out, weights, maxima, totals = heads[0], heads[1], rows[0], rows[1], scores[0], sums[0], sums[1]
    while True:
        item = take_items(counter, 1)
        if item >= B * num_keys * parts:
            return
        part, head, b = item % parts, item // parts % num_keys, item // parts // num_keys
        _load(qkv, b, H + head, num_keys, cos, sin, keys, values)
        for h in range(head * H // num_keys, (head + 1) * H // num_keys):
            for first in range(part * QUERIES, T, parts * QUERIES):
                last = min(first + QUERIES, T)
                start, stop = _scores(
                    qkv, b, h, first, last, cos, sin, scale, window, starts, keys, q, by_feature[0], weights
                )
                maxima[:] = F32(-np.inf)
                for j in range(start, stop, 4):
                    for i in range(QUERIES):
                        pairs = larger(weights[j, i], weights[j + 1, i]), larger(weights[j + 2, i], weights[j + 3, i])
                        maxima[i] = larger(maxima[i], larger(pairs[0], pairs[1]))
                totals[:] = F32(0)
                for j in range(start, stop):
                    for i in range(QUERIES):
                        power = exp2(weights[j, i] - maxima[i])
                        weights[j, i] = power
                        totals[i] += power
                _multiply(weights[start:].T, values[start:], out, last - first, stop - start, D, 0)
                for t in range(first, last):
                    factor = F32(1) / totals[t - first]
                    for i in range(D):
                        o[b, t, h, i] = out[t - first, i] * factor
                    log_sums[b, h, t] = maxima[t - first] + np.log2(totals[t - first])


@kernel
def attention_backward(counter, qkv, cos, sin, scale, window, starts, memory, o, log_sums, do, dqkv):
    """The gradient of `attention_forward`; a thread takes a head of keys with the heads of queries that share it.

    Source: Dao et al. 2022, "FlashAttention", algorithm 4, with all keys of a query in one tile.
    """
    B, T, H, D = o.shape
    num_keys = (qkv.shape[2] - H) // 2
    heads, rows, by_feature, scores, sums = _own_memory(counter, memory)
    keys, values, dkeys, dvalues, q, dq, dout = heads[0], heads[1], heads[2], heads[3], rows[0], rows[1], rows[2]
    weights, slopes, logs, products = scores[0], scores[1], sums[0], sums[1]
    while True:
        item = take_items(counter, 1)
        if item >= B * num_keys:
            return
        b, head = item // num_keys, item % num_keys
        _load(qkv, b, H + head, num_keys, cos, sin, keys, values)
        dkeys[:] = dvalues[:] = F32(0)
        for h in range(head * H // num_keys, (head + 1) * H // num_keys):
            for first in range(0, T, QUERIES):
                last = min(first + QUERIES, T)
                count = last - first
                start, stop = _scores(
                    qkv, b, h, first, last, cos, sin, scale, window, starts, keys, q, by_feature[0], weights
                )
                for t in range(first, last):
                    product = F32(0)
                    for i in range(D):
                        dout[t - first, i] = do[b, t, h, i]
                        product += do[b, t, h, i] * o[b, t, h, i]
                    logs[t - first], products[t - first] = log_sums[b, h, t], product
                _transpose(dout, count, by_feature[1])
                _multiply(values[start:], by_feature[1], slopes[start:], stop - start, D, QUERIES, 0)
                for j in range(start, stop):
                    for i in range(QUERIES):
                        weight = exp2(weights[j, i] - logs[i])
                        weights[j, i] = weight
                        slopes[j, i] = weight * (slopes[j, i] - products[i])
                _multiply(weights[start:], dout, dvalues[start:], stop - start, count, D, 1)
                _multiply(slopes[start:], q, dkeys[start:], stop - start, count, D, 1)
                _multiply(slopes[start:].T, keys[start:], dq, count, stop - start, D, 0)
                for t in range(first, last):
                    rotate(dq[t - first], dqkv[b, t, h], cos[t], sin[t], F32(-1), F32(scale) * LN_2)
        for t in range(T):
            rotate(dkeys[t], dqkv[b, t, H + head], cos[t], sin[t], F32(-1), LN_2)
            for i in range(D):
                dqkv[b, t, H + num_keys + head, i] = dvalues[t, i]
