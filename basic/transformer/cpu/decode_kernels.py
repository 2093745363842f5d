"""The kernels of single steps of generation on a CPU: multiplications by weights that are read once, and attention.

N rows · K features of a row · B sequences · T tokens of each · D features of a head
"""

from __future__ import annotations

import numpy as np

from basic.common.native.instructions import dot_products, larger, take_items
from basic.transformer.cpu.attention_kernels import rotate
from basic.transformer.cpu.kernels import F32, exp2, kernel

U16, U32 = np.uint16, np.uint32
_NUMBERS = 1 << 16
"""Numbers that a thread copies at a time."""


@kernel
def copy_upper_halves(counter, numbers, halves, lost):
    """Copy the upper 16 bits of float32 numbers; sets lost[0] to 1 and stops early if others are not 0."""
    while True:
        start = take_items(counter, _NUMBERS)
        if start >= len(numbers) or lost[0]:
            return
        part, to, lower = numbers[start : start + _NUMBERS], halves[start : start + _NUMBERS], U32(0)
        for i in range(len(part)):
            bits = F32(part[i]).view(np.uint32)
            lower = U32(lower | U32(bits & U32(0xFFFF)))  # else Numba computes with 64 bits
            to[i] = U16(U32(bits >> U32(16)))
        if lower:
            lost[0] = 1


@kernel
def multiply(counter, x, weights, chunk, add, y):
    """y = x W^T, or with `add` y += x W^T, for the matrices W below each other.

    Args:
        x: (N, K).
        weights: a tuple of matrices (outputs, K), float32 or halves of it (`dot_products`).
        chunk: outputs that a thread computes at a time.
        y: (N, all outputs).
    """
    rows = len(x)
    while True:
        item, number, before = take_items(counter, 1), 0, 0
        while number < len(weights) and item * chunk >= len(weights[number]):
            item -= -(-len(weights[number]) // chunk)
            before += len(weights[number])
            number += 1
        if number == len(weights):
            return
        matrix = weights[number]
        for index in range(item * chunk, min((item + 1) * chunk, len(matrix))):
            weight, column = matrix[index], before + index
            full = rows - rows % 4
            for row in range(0, full, 4):
                totals = dot_products((x[row], x[row + 1], x[row + 2], x[row + 3]), weight)
                for i in range(4):
                    y[row + i, column] = totals[i] + (y[row + i, column] if add else F32(0))
            for row in range(full, rows):
                total = dot_products((x[row],), weight)[0]
                y[row, column] = total + (y[row, column] if add else F32(0))


@kernel
def decode_attention(counter, position, qkv, cos, sin, scale, window, keys, values, scores, o):
    """Attention of the next tokens of each sequence, whose keys and values are added to the cache.

    Args:
        position: [that of the first of these tokens].
        qkv: (B, T, queries + keys + values, D), changed.
        cos, sin: (context, D / 2); or (context, 0) for no rotation.
        scale: of the queries, such that scores are logarithms to the base of 2.
        window: number of tokens that it attends to; 0 for all.
        keys, values: (B, heads of keys, context, D).
        scores: (B, heads of keys, context), overwritten.
        o: (B, T, queries, D).
    """
    B, T, heads, D = qkv.shape
    num_keys = keys.shape[1]
    num_queries = heads - 2 * num_keys
    group = num_queries // num_keys
    while True:
        item = take_items(counter, 1)
        if item >= B * num_keys:
            return
        b, head = item // num_keys, item % num_keys
        for token in range(T):
            t = position[0] + token
            start = max(0, t + 1 - window) if window else 0
            key, value = qkv[b, token, num_queries + head], qkv[b, token, num_queries + num_keys + head]
            rotate(key, key, cos[t], sin[t], F32(1), F32(1))
            for i in range(D):
                keys[b, head, t, i], values[b, head, t, i] = key[i], value[i]
            row = scores[b, head, start : t + 1]
            for index in range(head * group, (head + 1) * group):
                query, out = qkv[b, token, index], o[b, token, index]
                rotate(query, query, cos[t], sin[t], F32(1), F32(scale))
                maximum, total = F32(-np.inf), F32(0)
                for j in range(len(row)):
                    row[j] = dot_products((query,), keys[b, head, start + j])[0]
                    maximum = larger(maximum, row[j])
                for j in range(len(row)):
                    power = exp2(row[j] - maximum)
                    row[j] = power
                    total += power
                for i in range(D):
                    out[i] = F32(0)
                for j in range(len(row)):
                    other, weight = values[b, head, start + j], row[j] / total
                    for i in range(D):
                        out[i] += weight * other[i]
