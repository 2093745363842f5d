"""AdamW in Triton: one pass over a parameter, its gradient and its two moments.

All that changes from step to step (learning rate, step count, clipping factor, whether the step counts at all) is read
from memory on the device, so that nobody waits for it and a recorded CUDA graph can be replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _step(PARAMETER, GRADIENT, FIRST, SECOND, SCALARS, beta1, beta2, eps, weight_decay, size, BLOCK: tl.constexpr):
    learning_rate, factor = tl.load(SCALARS), tl.load(SCALARS + 1)
    first_correction, second_correction = tl.load(SCALARS + 2), tl.load(SCALARS + 3)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # A factor that is not a number, from a loss or gradient that is not finite, lets the step touch nothing.
    mask = places < tl.where(factor == factor, size, 0)
    parameter = tl.load(PARAMETER + places, mask=mask)
    gradient = tl.load(GRADIENT + places, mask=mask).to(tl.float32) * factor
    first = tl.load(FIRST + places, mask=mask)
    second = tl.load(SECOND + places, mask=mask)
    parameter *= 1 - learning_rate * weight_decay
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient * gradient
    denominator = tl.sqrt(second / second_correction) + eps
    parameter -= learning_rate / first_correction * first / denominator
    tl.store(PARAMETER + places, parameter, mask=mask)
    tl.store(FIRST + places, first, mask=mask)
    tl.store(SECOND + places, second, mask=mask)


def step_parameter(
    parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, scalars: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Change a parameter and its moments in place.

    Args:
        parameter, first, second: contiguous float32 of the same shape.
        gradient: the same shape, contiguous, any precision.
        scalars: float32 (4,): learning rate, factor on the gradient (NaN to leave everything as it is), and the
            corrections of the two moments, 1 - beta ** step.
    """
    block = 2048
    _step[(triton.cdiv(parameter.numel(), block),)](
        parameter, gradient, first, second, scalars, beta1, beta2, eps, weight_decay, parameter.numel(),
        BLOCK=block, num_warps=8)  # fmt: skip
