"""The passes over memory of the operators for a CPU, each one a kernel: what torch would do in several passes.

Arrays are contiguous float32. The threads of a call take rows from `counter`, which starts at [0], a fixed number at a
time; sums over rows have an array for each such number. So the result of a kernel does not depend on the number of
threads.

    N rows · D features of a head · T tokens · C keys of a tile
"""

from __future__ import annotations

import numpy as np

from basic.common.native.instructions import float32s_at, larger, take_items
from basic.common.native.kernel import Kernel

F32, I32 = np.float32, np.int32
LOG2_E, LN_2 = F32(1.4426950408889634), F32(0.6931471805599453)
ROWS = 16
"""Rows that a thread takes at a time."""
BLOCK = 1 << 12
"""Numbers of a parameter that a thread takes at a time."""
# Sums may be computed in any order, which vector code needs. NaN and infinity are kept.
_FAST = {"fastmath": {"reassoc", "nsz", "arcp", "contract"}, "separate": True}


def _kernel(function):
    return Kernel(function, _FAST)


def _inlined(function):
    return Kernel(function, {"fastmath": {"nsz", "contract"}, "forceinline": True})


@_inlined
def _exp2(x):
    """2^x within 1.5e-7 of it for x <= 0, and 0 for x < -100: a polynomial of degree 5 of the fraction."""
    bounded = F32(-100) if x < F32(-100) else x
    whole = np.floor(bounded)
    t = bounded - whole
    p = F32(1.8775767e-3) * t + F32(8.9893397e-3)
    p = p * t + F32(5.5826318e-2)
    p = p * t + F32(2.4015361e-1)
    p = p * t + F32(6.9315308e-1)
    p = p * t + F32(9.9999994e-1)
    scaled = I32(I32(I32(whole) << I32(23)) + F32(p).view(np.int32)).view(np.float32)  # adds to the exponent
    return F32(0) if x < F32(-100) else scaled


@_inlined
def _sigmoid(x):
    power = _exp2(-abs(x) * LOG2_E)
    return (F32(1) if x >= F32(0) else power) / (F32(1) + power)


@_kernel
def norm_forward(counter, x, weight, eps, y, scales):
    rows, width = x.shape
    while True:
        first = take_items(counter, ROWS)
        if first >= rows:
            return
        for row in range(first, min(first + ROWS, rows)):
            squares = F32(0)
            for i in range(width):
                squares += x[row, i] * x[row, i]
            scale = F32(1) / np.sqrt(squares / F32(width) + F32(eps))
            scales[row] = scale
            for i in range(width):
                y[row, i] = x[row, i] * scale * weight[i]


@_kernel
def norm_backward(counter, x, weight, scales, dy, dx, dweights):
    """dweights has a row for each ROWS rows."""
    rows, width = x.shape
    while True:
        first = take_items(counter, ROWS)
        if first >= rows:
            return
        part = first // ROWS
        for i in range(width):
            dweights[part, i] = F32(0)
        for row in range(first, min(first + ROWS, rows)):
            scale, product = scales[row], F32(0)
            for i in range(width):
                product += dy[row, i] * weight[i] * x[row, i]
            factor = product * scale * scale / F32(width)
            for i in range(width):
                dx[row, i] = (dy[row, i] * weight[i] - x[row, i] * factor) * scale
                dweights[part, i] += dy[row, i] * x[row, i] * scale


@_kernel
def swiglu_forward(counter, gates_values, y):
    rows, width = y.shape
    while True:
        first = take_items(counter, ROWS)
        if first >= rows:
            return
        for row in range(first, min(first + ROWS, rows)):
            for i in range(width):
                gate = gates_values[row, i]
                y[row, i] = gate * _sigmoid(gate) * gates_values[row, width + i]


@_kernel
def swiglu_backward(counter, gates_values, dy, dgates_values):
    """Also write over dy what `swiglu_forward` makes."""
    rows, width = dy.shape
    while True:
        first = take_items(counter, ROWS)
        if first >= rows:
            return
        for row in range(first, min(first + ROWS, rows)):
            gates, values = gates_values[row, :width], gates_values[row, width:]
            dgates, dvalues = dgates_values[row, :width], dgates_values[row, width:]
            for i in range(width):
                gate, gradient = gates[i], dy[row, i]
                slope = _sigmoid(gate)
                activation = gate * slope
                dvalues[i] = activation * gradient
                dgates[i] = (slope + activation * (F32(1) - slope)) * gradient * values[i]
                dy[row, i] = activation * values[i]


@_kernel
def cross_entropy(counter, logits, targets, factors, losses, with_gradient):
    """Write the losses, and over the logits the gradient: a row's softmax, minus 1 for its target, times its factor."""
    rows, vocab_size = logits.shape
    while True:
        first = take_items(counter, ROWS)
        if first >= rows:
            return
        for row in range(first, min(first + ROWS, rows)):
            target, maximum = logits[row, targets[row]], logits[row, 0]
            for i in range(vocab_size):
                maximum = larger(maximum, logits[row, i])
            total = F32(0)
            for i in range(vocab_size):
                power = _exp2((logits[row, i] - maximum) * LOG2_E)
                logits[row, i] = power
                total += power
            losses[row] = np.log(total) + (maximum - target)
            if with_gradient:
                factor = factors[row] / total
                for i in range(vocab_size):
                    logits[row, i] *= factor
                logits[row, targets[row]] -= factors[row]


@_inlined
def _rotate(from_, to, cos, sin, direction, factor):
    """Rotate a head by its angles, if there are any, and multiply it by a factor; `to` may be `from_`.

    Args:
        direction: 1; or -1 for the rotation back, which is that of the gradient.
    """
    for pair in range(len(cos)):
        x, y, c, s = from_[2 * pair] * factor, from_[2 * pair + 1] * factor, cos[pair], sin[pair] * direction
        to[2 * pair] = x * c - y * s
        to[2 * pair + 1] = x * s + y * c
    if len(cos) == 0:
        for i in range(len(from_)):
            to[i] = from_[i] * factor


@_inlined
def _place(head, num_queries, num_keys):
    """Where a head of a projection is: in queries, keys or values (0, 1, 2), its first index there, and how often."""
    group = num_queries // num_keys
    if head < num_queries:
        return 0, head, 1
    if head < num_queries + num_keys:
        return 1, (head - num_queries) * group, group
    return 2, (head - num_queries - num_keys) * group, group


@_kernel
def split_heads(counter, qkv, cos, sin, scale, q, k, v):
    """Rotate and scale heads of queries, rotate heads of keys, and copy each head to its place.

    Args:
        qkv: (B, T, queries + keys + values, D).
        cos, sin: (T, D / 2); or (T, 0) for no rotation.
        scale: of the queries.
        q, k, v: (B, queries, T, D), in which keys and values are repeated for each of their group of queries.
    """
    B, T, H, D = qkv.shape
    num_queries = q.shape[1]
    num_keys = (H - num_queries) // 2
    while True:
        first = take_items(counter, ROWS)
        if first >= B * T:
            return
        for row in range(first, min(first + ROWS, B * T)):
            b, t = row // T, row % T
            for head in range(H):
                part, index, copies = _place(head, num_queries, num_keys)
                out, num_angles = (q, k, v)[part], 0 if part == 2 else cos.shape[1]
                to = out[b, index, t]
                factor = F32(scale) if part == 0 else F32(1)
                _rotate(qkv[b, t, head], to, cos[t, :num_angles], sin[t, :num_angles], F32(1), factor)
                for other in range(index + 1, index + copies):
                    for i in range(D):
                        out[b, other, t, i] = to[i]


@_kernel
def join_heads(counter, dq, dk, dv, cos, sin, scale, dqkv):
    """The gradient of `split_heads`, from that of its results, which are changed."""
    B, T, H, D = dqkv.shape
    num_queries = dq.shape[1]
    num_keys = (H - num_queries) // 2
    while True:
        first = take_items(counter, ROWS)
        if first >= B * T:
            return
        for row in range(first, min(first + ROWS, B * T)):
            b, t = row // T, row % T
            for head in range(H):
                part, index, copies = _place(head, num_queries, num_keys)
                gradient, num_angles = (dq, dk, dv)[part], 0 if part == 2 else cos.shape[1]
                from_ = gradient[b, index, t]
                for other in range(index + 1, index + copies):
                    for i in range(D):
                        from_[i] += gradient[b, other, t, i]
                factor = F32(scale) if part == 0 else F32(1)
                _rotate(from_, dqkv[b, t, head], cos[t, :num_angles], sin[t, :num_angles], F32(-1), factor)


@_inlined
def _mask(row, query, first_key, window, first_token):
    """Write -inf and 0 over scores that a query may not use; returns the bounds of those that are not 0.

    The bounds are multiples of 32 or the row's end: loops over other numbers end with up to 31 single steps.
    """
    start = max(first_key, first_token, query - window + 1 if window else 0) - first_key
    stop = query - first_key + 1
    low, high = start - start % 32, min(len(row), stop + -stop % 32)
    row[:low] = row[high:] = F32(0)
    row[low:start] = row[stop:high] = F32(-np.inf)
    return low, high


@_kernel
def attention_weights(counter, scores, first_query, first_key, window, starts, log_sums):
    """Overwrite the scores of a tile, logarithms to the base of 2, with their softmax over the keys not masked.

    Args:
        scores: (items, queries, C); an item is a head of a sequence, and each sequence has equally many.
        first_query, first_key: the indices of the tile's first ones.
        window: number of keys that a query may attend to; 0 for all before it.
        starts: (sequences, T), the first token of each token's document; or (sequences, 0).
        log_sums: (items, T); those of the tile are written.
    """
    items, queries, _ = scores.shape
    while True:
        first = take_items(counter, ROWS)
        if first >= items * queries:
            return
        for row in range(first, min(first + ROWS, items * queries)):
            item, index = row // queries, row % queries
            query = first_query + index
            first_token = starts[item * len(starts) // items, query] if starts.shape[1] else 0
            low, high = _mask(scores[item, index], query, first_key, window, first_token)
            row, maximum, total = scores[item, index, low:high], scores[item, index, low], F32(0)
            for i in range(len(row)):
                maximum = larger(maximum, row[i])
            for i in range(len(row)):
                power = _exp2(row[i] - maximum)
                row[i] = power
                total += power
            factor = F32(1) / total
            for i in range(len(row)):
                row[i] *= factor
            log_sums[item, query] = maximum + np.log(total) * LOG2_E


@_kernel
def attention_gradients(counter, scores, dweights, first_query, first_key, window, starts, log_sums):
    """Overwrite the scores of a tile with their softmax, and the gradient of the weights with that of the scores."""
    items, queries, _ = scores.shape
    while True:
        first = take_items(counter, ROWS)
        if first >= items * queries:
            return
        for row in range(first, min(first + ROWS, items * queries)):
            item, index = row // queries, row % queries
            query = first_query + index
            first_token = starts[item * len(starts) // items, query] if starts.shape[1] else 0
            low, high = _mask(scores[item, index], query, first_key, window, first_token)
            weights, slopes = scores[item, index, low:high], dweights[item, index, low:high]
            log_sum, product = log_sums[item, query], F32(0)
            for i in range(len(weights)):
                weight = _exp2(weights[i] - log_sum)
                weights[i] = weight
                product += weight * slopes[i]
            for i in range(len(weights)):
                slopes[i] = weights[i] * (slopes[i] - product) * LN_2
            dweights[item, index, :low] = F32(0)
            dweights[item, index, high:] = F32(0)


@_kernel
def decode_attention(counter, position, qkv, cos, sin, scale, window, keys, values, scores, o):
    """Attention of one token of each sequence, whose keys and values are added to the cache.

    Args:
        position: [that of the token].
        qkv: (B, queries + keys + values, D), changed.
        cos, sin: (context, D / 2); or (context, 0) for no rotation.
        scale: of the queries, such that scores are logarithms to the base of 2.
        window: number of tokens that it attends to; 0 for all.
        keys, values: (B, heads of keys, context, D).
        scores: (B, heads of keys, context), overwritten.
        o: (B, queries, D).
    """
    B, heads, D = qkv.shape
    num_keys = keys.shape[1]
    num_queries = heads - 2 * num_keys
    group, t = num_queries // num_keys, position[0]
    start = max(0, t + 1 - window) if window else 0
    while True:
        item = take_items(counter, 1)
        if item >= B * num_keys:
            return
        b, head = item // num_keys, item % num_keys
        key, value = qkv[b, num_queries + head], qkv[b, num_queries + num_keys + head]
        _rotate(key, key, cos[t], sin[t], F32(1), F32(1))
        for i in range(D):
            keys[b, head, t, i], values[b, head, t, i] = key[i], value[i]
        row = scores[b, head, start : t + 1]
        for index in range(head * group, (head + 1) * group):
            query, out = qkv[b, index], o[b, index]
            _rotate(query, query, cos[t], sin[t], F32(1), F32(scale))
            maximum, total = F32(-np.inf), F32(0)
            for j in range(len(row)):
                other, score = keys[b, head, start + j], F32(0)
                for i in range(D):
                    score += query[i] * other[i]
                row[j] = score
                maximum = larger(maximum, score)
            for j in range(len(row)):
                power = _exp2(row[j] - maximum)
                row[j] = power
                total += power
            for i in range(D):
                out[i] = F32(0)
            for j in range(len(row)):
                other, weight = values[b, head, start + j], row[j] / total
                for i in range(D):
                    out[i] += weight * other[i]


@_kernel
def adamw(counters, addresses, sizes, rates, root_factors, factor, keep, beta1, beta2, eps):
    """A step of AdamW for several parameters; see `dispatch.step_adamw`.

    Args:
        counters: one of each parameter, [0].
        addresses: (parameters, 4): of the parameter, the gradient and the two moments.
    """
    for number in range(len(sizes)):
        parameter, gradient = (
            float32s_at(addresses[number, 0], sizes[number]),
            float32s_at(addresses[number, 1], sizes[number]),
        )
        first, second = (
            float32s_at(addresses[number, 2], sizes[number]),
            float32s_at(addresses[number, 3], sizes[number]),
        )
        rate, root_factor = F32(rates[number]), F32(root_factors[number])
        while True:
            start = take_items(counters[number:], BLOCK)
            if start >= len(parameter):
                break
            for i in range(start, min(start + BLOCK, len(parameter))):
                g = gradient[i] * F32(factor)
                m = first[i] * F32(beta1) + g * F32(1 - beta1)
                v = second[i] * F32(beta2) + g * g * F32(1 - beta2)
                first[i], second[i] = m, v
                parameter[i] = parameter[i] * F32(keep) - rate * m / (np.sqrt(v) * root_factor + F32(eps))
