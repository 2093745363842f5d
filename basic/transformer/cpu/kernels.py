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


def kernel(function):
    return Kernel(function, _FAST)


def inlined(function):
    return Kernel(function, {"fastmath": {"nsz", "contract"}, "forceinline": True})


@inlined
def exp2(x):
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


@inlined
def _sigmoid(x):
    power = exp2(-abs(x) * LOG2_E)
    return (F32(1) if x >= F32(0) else power) / (F32(1) + power)


@kernel
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
            # In float64: the estimate that is faster in float32 makes NaN of infinity, which overflowed squares are.
            scale = F32(1 / np.sqrt(np.float64(squares / F32(width) + F32(eps))))
            scales[row] = scale
            for i in range(width):
                y[row, i] = x[row, i] * scale * weight[i]


@kernel
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


@kernel
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


@kernel
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


@kernel
def cross_entropy(counter, logits, targets, factors, losses, vocab_size, with_gradient):
    """Write the losses, and over the logits the gradient: a row's softmax, minus 1 for its target, times its factor."""
    rows = len(logits)
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
                power = exp2((logits[row, i] - maximum) * LOG2_E)
                logits[row, i] = power
                total += power
            losses[row] = np.log(total) + (maximum - target)
            if with_gradient:
                factor = factors[row] / total
                for i in range(vocab_size):
                    logits[row, i] *= factor
                logits[row, targets[row]] -= factors[row]


@kernel
def adamw(counters, addresses, sizes, rates, root_factors, factor, keep, beta1, beta2, eps):
    """A step of AdamW for several parameters; see `dispatch.step_adamw`.

    Args:
        counters: one of each parameter, [0].
        addresses: (parameters, 4): of the parameter, the gradient and the two moments.
    """
    for number in range(len(sizes)):
        at, size = addresses[number], sizes[number]
        parameter, gradient = float32s_at(at[0], size), float32s_at(at[1], size)
        first, second = float32s_at(at[2], size), float32s_at(at[3], size)
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
